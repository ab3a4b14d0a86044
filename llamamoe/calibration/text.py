"""Calibration text: sequences of tokens, mixed by domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.receipts import DOCUMENT_HASHES
from ..errors import UsageError
from .compute import MIN_TOKENS
from .reading import LOOK_ROWS, Piece, Reader, document_cap, document_hash, shared_documents
from .soundness import check_ids, odd_warnings, shape_facts, tokens_per_byte, unknown_share

__all__ = ["MIN_TOKENS", "CalibrationText", "calibration_text", "document_hash", "shared_documents", "shares"]

SHORTENED = 128
"""Length below which sequences are not shortened to give every domain one."""
_KEPT = 0.75


@dataclass(frozen=True)
class CalibrationText:
    """Calibration text as sequences of token ids.

    Attributes:
        ids_ST: int64 ``[S, T]``, S sequences of T tokens, no padding.
        domains_S: The domain of each sequence.
        clusters_S: int64 ``[S]``, the text cluster of each sequence; None if clusters were not requested.
        facts: Origin and amount of the text as JSON-compatible data, for the receipt.
        warnings: Sentences for the user.
    """

    ids_ST: np.ndarray
    domains_S: tuple[str, ...]
    clusters_S: np.ndarray | None
    facts: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def document_hashes(self) -> frozenset[str]:
        """`document_hash` of every document that tokens were taken from; empty for sampled text."""
        return frozenset(self.facts.get(DOCUMENT_HASHES, ()))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, ``S T``."""
        return int(self.ids_ST.size)


def calibration_text(
    patterns: Sequence[str | Path],
    tokenizer: Any,
    *,
    num_tokens: int,
    length: int,
    weights: Mapping[str, float] | None,
    seed: int,
    vocab_size: int,
) -> CalibrationText:
    """Take ``num_tokens // length`` sequences of text, distributed among the domains by weight.

    The rules:

    - The domains are those of the first `LOOK_ROWS` rows of each file (of every ``txt`` file); each receives its share
      of the sequences, by largest remainder (ties go to the earlier domain).
    - A domain's documents are in the order of patterns, files and rows, each with the beginning-of-sequence token
      that the tokenizer itself adds, and with the end-of-sequence token between two of them (not after the last);
      sequences are cut from that stream, so they may begin anywhere in a document. Reading stops once there is enough.
    - A document contributes at most its first ``max(4 * length, 1/8 of its domain's tokens)`` tokens, the leading one
      counted, so that no domain is only the beginning of one book. Only if the domain has too few documents may all of
      them contribute more, up to the same higher cap.
    - A domain with too little text contributes its complete sequences, and the others fill the gap; if all are used
      up, fewer tokens are used. Both cases warn. If even that leaves nothing (domains shorter than a
      sequence), sequences are shortened, also if there are fewer sequences than domains (not below
      `SHORTENED`).
    - The sequences are put in an order that depends on ``seed`` only, so that the first few are a mixture too.

    Args:
        patterns: Files, folders and globs; see `llamamoe.data.text.read_documents`.
        tokenizer: A transformers tokenizer.
        num_tokens: Maximum number of tokens, at least `MIN_TOKENS`.
        length: Tokens per sequence.
        weights: Non-negative weight by domain; domains that are not named get no text. None: equal weights.
        seed: Seed of the order of the sequences.
        vocab_size: Rows of the model's embedding.

    Raises:
        UsageError: Nothing matches ``patterns``, there are fewer than `MIN_TOKENS` tokens, or a number, a weight or a domain
            name is invalid.
        CheckpointError: The tokenizer produces ids that the model lacks.
        LlamaMoeError: A document cannot be read or decoded.
    """
    if num_tokens < MIN_TOKENS:
        raise UsageError(f"num_tokens is {num_tokens}, but calibration needs at least {MIN_TOKENS} tokens.")
    if length < 2:
        raise UsageError(f"The length of calibration sequences is {length}, but must be at least 2.")
    check_weights(weights)
    reader = Reader(patterns, tokenizer, num_tokens)
    weights = _by_domain(weights, list(reader.pools))
    mixture = _mix(reader, weights, num_tokens, length)
    return _assemble(reader, mixture, weights, seed, vocab_size)


def check_weights(weights: Mapping[str, float] | None) -> None:
    """Refuse weights that are negative, not finite, or all zero.

    Raises:
        UsageError: A weight is invalid; the message names the domain.
    """
    for domain, weight in (weights or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"The weight of the domain '{domain}' is {weight}, but must be a number from 0.")
    if weights is not None and not any(weights.values()):
        raise UsageError(
            "All domain weights are zero.", hint="Give at least one domain a positive weight, or omit the weights."
        )


def _by_domain(weights: Mapping[str, float] | None, found: Sequence[str]) -> dict[str, float]:
    """Return positive weights that sum to 1, in the order in which the domains were found."""
    unknown = sorted(set(weights or {}) - set(found))
    if unknown:
        raise UsageError(
            f"Weights name {', '.join(map(repr, unknown))}, but the text has the domains {', '.join(found)}.",
            hint=f"The domains of a file are those of its first {LOOK_ROWS} rows.",
        )
    positive = {domain: 1.0 if weights is None else float(weights.get(domain, 0.0)) for domain in found}
    largest = max(positive.values())
    scaled = {domain: weight / largest for domain, weight in positive.items() if weight / largest > 0}
    total = sum(scaled.values())
    return {domain: weight / total for domain, weight in scaled.items()}


def shares(weights: Mapping[str, float], count: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Distribute ``count`` items by weight, by largest remainder, with upper limits.

    Domains whose share exceeds their limit get the limit; the rest is distributed among the others in the same way.

    Args:
        weights: Positive.
        count: Number of items.
        limits: Maximum per domain, for the domains that have one.

    Returns:
        A number for each key of ``weights``; their sum is ``count``, or less if the limits allow no more.
    """
    fixed: dict[str, int] = {}
    while True:
        free = {domain: weight for domain, weight in weights.items() if domain not in fixed}
        rest, total = count - sum(fixed.values()), sum(free.values())
        exact = {domain: rest * weight / total for domain, weight in free.items()}
        out = {domain: int(share) for domain, share in exact.items()}
        by_remainder = sorted(free, key=lambda domain: out[domain] - exact[domain])
        for domain in by_remainder[: rest - sum(out.values())]:
            out[domain] += 1
        over = {domain: limits[domain] for domain in free if out[domain] > limits.get(domain, out[domain])}
        if not over:
            return {domain: fixed.get(domain, out.get(domain, 0)) for domain in weights}
        fixed |= over


@dataclass(frozen=True)
class _Mixture:
    """Number and length of the sequences that each domain contributes."""

    length: int
    sequences: dict[str, int]
    warnings: tuple[str, ...]


def _mix(reader: Reader, weights: Mapping[str, float], num_tokens: int, length: int) -> _Mixture:
    """Read until the shares are available, redistributing what a domain lacks."""
    asked = min(length, num_tokens)
    length = min(asked, max(SHORTENED, num_tokens // len(weights)))
    fair = shares(weights, num_tokens // length, {})
    sequences, limits = _share(reader, weights, num_tokens, length)
    available = {domain: reader.pools[domain].size(None, reader.eos) for domain in weights}
    total = sum(available.values())
    if sum(sequences.values()) < num_tokens // length:  # all text was read
        if total < MIN_TOKENS:
            raise UsageError(
                f"The calibration text has only {total} tokens; at least {MIN_TOKENS} are needed.",
                hint="Provide more text; 65536 tokens are a good amount.",
            )
        if (fitting := _fitting_length(list(available.values()), length)) < length:
            length = fitting
            fair = shares(weights, num_tokens // length, {})
            sequences, limits = _share(reader, weights, num_tokens, length)
    warnings = _short_warnings(sequences, fair, limits, available)
    if length < asked:
        why = "to fit the domains' text"
        if length == min(asked, max(SHORTENED, num_tokens // len(weights))):
            why = f"so that {num_tokens} tokens have a sequence of each of the {len(weights)} domains"
        warnings.append(f"Calibration sequences have {length} tokens instead of {asked}, {why}.")
    taken = sum(sequences.values()) * length
    if sum(sequences.values()) < num_tokens // length:
        warnings.append(f"The calibration text provides only {taken} of the {num_tokens} tokens asked for.")
    return _Mixture(length, sequences, tuple(warnings))


def _share(
    reader: Reader, weights: Mapping[str, float], num_tokens: int, length: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sequences of each domain, and those available from domains that ran out of text."""
    limits: dict[str, int] = {}
    while True:
        sequences = shares(weights, num_tokens // length, limits)
        reader.fill({domain: count * length for domain, count in sequences.items()}, length)
        available = {domain: reader.pools[domain].size(None, reader.eos) // length for domain in weights}
        short = {domain: available[domain] for domain in weights if available[domain] < sequences[domain]}
        if not short:
            return sequences, limits
        limits |= short


def _fitting_length(available: Sequence[int], length: int) -> int:
    """Return the longest sequence length, at most ``length``, that keeps about as many tokens as the best length would.

    Args:
        available: Tokens of each domain.
        length: Maximum length.
    """
    kept = {
        each: sum(tokens // each * each for tokens in available)
        for each in {min(length, tokens) for tokens in available if tokens}
    }
    return max(each for each, tokens in kept.items() if tokens >= _KEPT * max(kept.values()))


def _short_warnings(
    sequences: Mapping[str, int], fair: Mapping[str, int], limits: Mapping[str, int], available: Mapping[str, int]
) -> list[str]:
    short = [
        f"The domain '{domain}' has only {available[domain]} tokens of calibration text: it contributes {sequences[domain]} "
        f"instead of {fair[domain]} sequences, and the other domains contribute more if they can."
        for domain in limits
    ]
    none = [domain for domain, count in fair.items() if count == 0 and sequences[domain] == 0]
    if none:
        short.append(f"No calibration text is taken from {', '.join(none)}: its share is less than one sequence.")
    return short


def _assemble(
    reader: Reader, mixture: _Mixture, weights: Mapping[str, float], seed: int, vocab_size: int
) -> CalibrationText:
    length = mixture.length
    rows: list[np.ndarray] = []
    domains: list[str] = []
    used: list[Piece] = []
    facts: dict[str, Any] = {}
    unknown: dict[str, float] = {}
    for domain, count in mixture.sequences.items():
        tokens = count * length
        ids, pieces = reader.pools[domain].take(tokens, document_cap(tokens, length), reader.eos)
        rows.append(ids.reshape(count, length))
        domains += [domain] * count
        used += [piece for piece, _ in pieces]
        unknown[domain] = unknown_share(reader.tokenizer, ids)
        facts[domain] = {
            "weight": weights[domain],
            "sequences": count,
            "tokens": tokens,
            "documents": len(pieces),
            "tokens_per_byte": tokens_per_byte(pieces, reader.bos),
        }
    order = np.random.default_rng([seed, *b"calibration text"]).permutation(len(domains))
    ids_ST = np.ascontiguousarray(np.concatenate(rows)[order])
    check_ids(ids_ST, vocab_size)
    odd = odd_warnings({domain: facts[domain]["tokens_per_byte"] for domain in facts}, unknown)
    files = dict.fromkeys(piece.file for piece in used)
    return CalibrationText(
        ids_ST=ids_ST,
        domains_S=tuple(domains[i] for i in order),
        clusters_S=None,
        facts={
            "source": "text",
            **shape_facts(ids_ST),
            "seed": seed,
            "documents": len(used),
            "domains": facts,
            "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
            DOCUMENT_HASHES: sorted({piece.digest for piece in used}),
        },
        warnings=(*mixture.warnings, *odd),
    )
