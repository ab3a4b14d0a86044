"""Check that text suits the tokenizer: statistics, and warnings where they are unusual."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .reading import Piece

ODD_TOKENS_PER_BYTE = 0.7
"""English has 0.2 to 0.3 tokens per byte; a language or format unknown to the tokenizer has nearly 1."""
ODD_UNKNOWN_SHARE = 0.05


def shape_facts(ids_ST: np.ndarray) -> dict[str, Any]:
    """Return size and hash of the tokens, for the receipt."""
    digest = hashlib.sha256(np.ascontiguousarray(ids_ST, dtype="<i8").tobytes()).hexdigest()
    sequences, length = ids_ST.shape
    return {"tokens": int(ids_ST.size), "sequences": sequences, "length": length, "sha256_of_ids": digest}


def check_ids(ids_ST: np.ndarray, vocab_size: int) -> None:
    """Refuse ids for which the model has no embedding.

    Raises:
        CheckpointError: An id is too large; the message names the largest.
    """
    largest = int(ids_ST.max())
    if largest >= vocab_size:
        raise CheckpointError(
            f"The tokenizer produces the id {largest}, but the model has only {vocab_size} embeddings.",
            hint="The tokenizer belongs to another model; pass the model's own.",
        )


def tokens_per_byte(pieces: Sequence[tuple[Piece, int]], bos: int | None) -> float | None:
    """Return tokens per byte of UTF-8 over the first tokens of each document; None without text."""
    tokens = sum(count - (bos is not None) for _, count in pieces)
    size = sum(int(piece.byte_ends[count - 1]) for piece, count in pieces)
    return tokens / size if size else None


def unknown_share(tokenizer: Any, ids: np.ndarray) -> float:
    """Return the share of ``ids`` that are the unknown token, or one byte of a character that has no token.

    Line breaks and tabs, which some tokenizers encode as bytes only, do not count; nor do tokens of byte-level BPE.
    """
    vocabulary = tokenizer.get_vocab()
    names = (f"<0x{byte:02X}>" for byte in range(256) if byte not in b"\t\n\r")
    odd = {vocabulary[name] for name in names if name in vocabulary}
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        odd.add(tokenizer.unk_token_id)
    return float(np.isin(ids, sorted(odd)).mean()) if len(ids) else 0.0


def odd_warnings(per_byte: Mapping[str, float | None], unknown: Mapping[str, float]) -> list[str]:
    """Return warnings about domains whose text has unusual statistics.

    Args:
        per_byte: `tokens_per_byte` of each domain.
        unknown: `unknown_share` of each domain.
    """
    advice = (
        "Check that it is text in a language that the model was trained on, and that the tokenizer is the model's own."
    )
    warnings = []
    many = {domain: value for domain, value in per_byte.items() if value is not None and value > ODD_TOKENS_PER_BYTE}
    if many:
        listed = ", ".join(f"{domain} {value:.2f}" for domain, value in many.items())
        warnings.append(
            f"The tokenizer has hardly any word of this calibration text in its vocabulary (tokens per byte: {listed}; "
            f"English: 0.2 to 0.3). {advice}"
        )
    strange = {domain: value for domain, value in unknown.items() if value > ODD_UNKNOWN_SHARE}
    if strange:
        listed = ", ".join(f"{domain} {value:.0%}" for domain, value in strange.items())
        warnings.append(
            f"The tokenizer has no token for many characters of this calibration text (unknown tokens: {listed}). "
            + advice
        )
    return warnings
