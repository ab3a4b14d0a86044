"""Resolve weights of domains in the training mixture: published sets, given ones, and proportions of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...errors import UsageError, near_misses

PUBLISHED: dict[str, dict[str, float]] = {
    "llama": {
        "arxiv": 0.025, "book": 0.045, "c4": 0.15, "commoncrawl": 0.67, "github": 0.045, "stackexchange": 0.02,
        "wikipedia": 0.045,
    },
    "sheared_llama": {
        "arxiv": 0.007, "book": 0.091, "c4": 0.492, "commoncrawl": 0.361, "github": 0.008, "stackexchange": 0.01,
        "wikipedia": 0.031,
    },
}  # fmt: skip
"""Shares of tokens: LLaMA (arXiv:2302.13971, table 1), and Sheared-LLaMA's as used by LLaMA-MoE
(arXiv:2310.06694, arXiv:2406.16554)."""
UNIFORM, PROPORTIONAL = "uniform", "proportional"
NAMES = (*PUBLISHED, PROPORTIONAL, UNIFORM)


def mixture_weights(
    wanted: str | Mapping[str, float], tokens: Mapping[str, int], warnings: list[str] | None = None
) -> dict[str, float]:
    """Return the weight of every domain of a corpus.

    Args:
        wanted: ``"llama"``, ``"sheared_llama"``, ``"uniform"``, ``"proportional"`` (to the tokens), or weights by
            domain.
        tokens: Tokens of the corpus by domain.
        warnings: Sentences are appended on domains without weight, and on domains of a published set that the corpus
            lacks, so that the others share their weight.

    Returns:
        Weights by domain, in the order of ``tokens``, of sum 1.

    Raises:
        UsageError: An unknown name or domain, a weight that is negative or not finite, or all are zero.
    """
    warnings = [] if warnings is None else warnings
    if isinstance(wanted, str):
        given = _named(wanted, tokens)
        missing = [domain for domain in given if domain not in tokens]
        given = {domain: weight for domain, weight in given.items() if domain in tokens}
        if missing:
            warnings.append(f"the text has no {', '.join(missing)}: the other domains of {wanted!r} share their weight")
        if not given:
            raise UsageError(
                f"The text has none of the domains of {wanted!r} ({', '.join(missing)}).",
                hint=f"It has {', '.join(tokens)}: name their weights, or take uniform or proportional.",
            )
    else:
        given = _checked(wanted, tokens)
    total = math.fsum(given.values())
    if total <= 0:
        raise UsageError("All weights of the mixture are zero.", hint="Give one domain a weight.")
    weights = {domain: given.get(domain, 0.0) / total for domain in tokens}
    unnamed = [domain for domain in tokens if domain not in given]
    if unnamed:
        warnings.append(f"no weight is given to {', '.join(unnamed)}: nothing of that text is used")
    return weights


def _named(name: str, tokens: Mapping[str, int]) -> dict[str, float]:
    if name == UNIFORM:
        return dict.fromkeys(tokens, 1.0)
    if name == PROPORTIONAL:
        return {domain: float(count) for domain, count in tokens.items()}
    if name not in PUBLISHED:
        raise UsageError(f"unknown mixture {name!r}.", hint=near_misses(name, list(NAMES)))
    return dict(PUBLISHED[name])


def _checked(weights: Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
    for domain, weight in weights.items():
        if domain not in tokens:
            raise UsageError(f"The text has no domain {domain!r}.", hint=near_misses(domain, list(tokens)))
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"The weight of the domain {domain!r} is {weight}, but must be a number from 0.")
    return {domain: float(weight) for domain, weight in weights.items()}
