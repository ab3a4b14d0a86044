"""The results of an evaluation: sums over documents turned into means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..lazy import scipy


@dataclass(frozen=True)
class Score:
    """The scores of a model on a text.

    Attributes:
        documents: Documents with at least one scored token.
        tokens: Scored tokens.
        bytes: UTF-8 bytes of the text of these tokens.
        loss: Mean negative log-likelihood of a token, in nats: the log of the perplexity.
        loss_stderr: Its standard error over documents; None if a domain has fewer than two.
        perplexity: ``exp(loss)``.
        bits_per_byte: Negative log-likelihood in bits, by bytes: comparable between tokenizers.
        bits_per_byte_stderr: Its standard error over documents; None if a domain has fewer than two.
    """

    documents: int
    tokens: int
    bytes: int
    loss: float
    loss_stderr: float | None
    perplexity: float
    bits_per_byte: float
    bits_per_byte_stderr: float | None


@dataclass(frozen=True)
class Difference:
    """Model minus ``against`` on the same documents, which are taken as pairs.

    An interval without 0 is a significant difference at 5 %. Values of the loss are None if the tokenizers
    differ; standard errors and intervals are None if a domain has fewer than two documents.

    Attributes:
        loss: Nats per token.
        loss_stderr: Its standard error.
        loss_interval: Its 95 % confidence interval, by Student's t with Satterthwaite's degrees of freedom.
        perplexity_ratio: ``exp(loss)``.
        bits_per_byte: Bits per byte.
        bits_per_byte_stderr: Its standard error.
        bits_per_byte_interval: Its 95 % confidence interval.
    """

    loss: float | None
    loss_stderr: float | None
    loss_interval: tuple[float, float] | None
    perplexity_ratio: float | None
    bits_per_byte: float
    bits_per_byte_stderr: float | None
    bits_per_byte_interval: tuple[float, float] | None


@dataclass(frozen=True)
class ModelScores:
    """One model's scores.

    Attributes:
        model: The folder or Hub id.
        dtype: Dtype of the weights.
        domains: Scores by domain, in the order of the text.
        overall: Every token (for bits per byte: every byte) counts the same.
        mean_over_domains: Every domain counts the same: the means of its domains' losses and bits per byte.
    """

    model: str
    dtype: str
    domains: dict[str, Score]
    overall: Score
    mean_over_domains: Score


@dataclass(frozen=True)
class Differences:
    """`Difference` by domain, over all tokens, and as the mean over domains."""

    domains: dict[str, Difference]
    overall: Difference
    mean_over_domains: Difference


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        protocol: Description of the measurement.
        context_length: Tokens per window.
        stride: Tokens from the start of one window to the next; None: windows do not overlap.
        max_tokens: Tokens taken of each domain, or None for all.
        device: Device of the models.
        skipped_documents: Documents too short to have a scored token.
        model: The model's scores.
        against: The other model's, or None.
        comparable: The measure that may be compared between the two: ``"perplexity"`` (and bits per byte) if they cut
            the text into the same tokens, else ``"bits_per_byte"`` only; None without ``against``.
        difference: Model minus ``against``, or None.
        warnings: Sentences for the user, such as that a model was calibrated on documents of the text.
    """

    protocol: str
    context_length: int
    stride: int | None
    max_tokens: int | None
    device: str
    skipped_documents: int
    model: ModelScores
    against: ModelScores | None
    comparable: Literal["perplexity", "bits_per_byte"] | None
    difference: Differences | None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return asdict(self)


@dataclass(frozen=True)
class Counts:
    """Sums over each document of one domain, float64 [documents] each; ``nll`` is in nats."""

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


class _Estimate(NamedTuple):
    """A mean and, by domain, the influence of each document on it: float64 [documents]."""

    value: float
    influence: list[np.ndarray]

    def minus(self, other: _Estimate) -> _Estimate:
        """Return the difference of two estimates on the same documents."""
        paired = zip(self.influence, other.influence, strict=True)
        return _Estimate(self.value - other.value, [mine - theirs for mine, theirs in paired])

    def stderr(self) -> float | None:
        """Return the standard error, with documents as a sample of their domain and the domains as given."""
        variances = self._variances()
        return None if variances is None else math.sqrt(sum(variances))

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval, with Satterthwaite's (1946) degrees of freedom for unequal variances."""
        variances = self._variances()
        if variances is None:
            return None
        total = sum(variances)
        if total == 0:
            return self.value, self.value
        parts = zip(variances, self.influence, strict=True)
        freedom = total**2 / sum(variance**2 / (len(part) - 1) for variance, part in parts)
        half = float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(total)
        return self.value - half, self.value + half

    def _variances(self) -> list[float] | None:
        """Return the contribution of each domain to the variance; None if a domain has fewer than two documents."""
        if any(len(part) < 2 for part in self.influence):
            return None
        return [len(part) * float(np.var(part, ddof=1)) for part in self.influence]


def model_scores(model: str, dtype: str, counts: Mapping[str, Counts]) -> ModelScores:
    """Score one model from its sums by domain."""
    domains = list(counts.values())
    return ModelScores(
        model=model,
        dtype=dtype,
        domains={name: _result(_estimates([domain]), [domain]) for name, domain in counts.items()},
        overall=_result(_estimates(domains), domains),
        mean_over_domains=_result(_domain_means(domains), domains),
    )


def differences(counts: Mapping[str, Counts], against: Mapping[str, Counts], same_tokens: bool) -> Differences:
    """Compare two models whose sums are of the same documents in the same order."""
    mine, theirs = list(counts.values()), list(against.values())
    return Differences(
        domains={
            name: _difference(_estimates([counts[name]]), _estimates([against[name]]), same_tokens) for name in counts
        },
        overall=_difference(_estimates(mine), _estimates(theirs), same_tokens),
        mean_over_domains=_difference(_domain_means(mine), _domain_means(theirs), same_tokens),
    )


def _ratio(numerators: Sequence[np.ndarray], units: Sequence[np.ndarray]) -> _Estimate:
    """Return a ratio of sums, and the first-order influence of each document on it (the ratio estimator)."""
    total = sum(float(unit.sum()) for unit in units)
    value = sum(float(numerator.sum()) for numerator in numerators) / total
    return _Estimate(value, [(n - value * u) / total for n, u in zip(numerators, units, strict=True)])


def _estimates(domains: Sequence[Counts]) -> tuple[_Estimate, _Estimate]:
    """Return nats per token and bits per byte over all documents of ``domains``."""
    nats = _ratio([domain.nll for domain in domains], [domain.tokens for domain in domains])
    bits = _ratio([domain.nll / math.log(2) for domain in domains], [domain.bytes for domain in domains])
    return nats, bits


def _domain_means(domains: Sequence[Counts]) -> tuple[_Estimate, _Estimate]:
    """Return nats per token and bits per byte as means over domains."""
    each = [_estimates([domain]) for domain in domains]
    nats, bits = (
        _Estimate(
            sum(pair[kind].value for pair in each) / len(each),
            [pair[kind].influence[0] / len(each) for pair in each],
        )
        for kind in (0, 1)
    )
    return nats, bits


def _result(estimates: tuple[_Estimate, _Estimate], domains: Sequence[Counts]) -> Score:
    nats, bits = estimates
    return Score(
        documents=sum(int((domain.tokens > 0).sum()) for domain in domains),
        tokens=sum(int(domain.tokens.sum()) for domain in domains),
        bytes=sum(int(domain.bytes.sum()) for domain in domains),
        loss=nats.value,
        loss_stderr=nats.stderr(),
        perplexity=_exp(nats.value),
        bits_per_byte=bits.value,
        bits_per_byte_stderr=bits.stderr(),
    )


def _difference(
    mine: tuple[_Estimate, _Estimate], theirs: tuple[_Estimate, _Estimate], same_tokens: bool
) -> Difference:
    nats, bits = (a.minus(b) for a, b in zip(mine, theirs, strict=True))
    return Difference(
        loss=nats.value if same_tokens else None,
        loss_stderr=nats.stderr() if same_tokens else None,
        loss_interval=nats.interval() if same_tokens else None,
        perplexity_ratio=_exp(nats.value) if same_tokens else None,
        bits_per_byte=bits.value,
        bits_per_byte_stderr=bits.stderr(),
        bits_per_byte_interval=bits.interval(),
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # larger values overflow; such a model is useless anyway
