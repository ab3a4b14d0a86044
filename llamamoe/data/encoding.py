"""Encode documents as tokens with the number of bytes of text that each covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .text import Document


@dataclass(frozen=True)
class Encoded:
    """One document's tokens.

    Attributes:
        document: The document they are of, whole.
        ids: int64 [T], the beginning-of-sequence token first if there is one.
        byte_ends: int64 [T], the bytes of UTF-8 text that are complete after each token.
        characters: Characters of the text that the tokens cover: all, unless ``limit`` cut them.
        limit: The number of text tokens that the document was cut to, or None.
    """

    document: Document
    ids: np.ndarray
    byte_ends: np.ndarray
    characters: int
    limit: int | None


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` of a document; all but the first are scored, and none before ``first``."""

    document: int
    start: int
    stop: int
    first: int = 0

    @property
    def begin(self) -> int:
        """The first scored token, counted in the document."""
        return max(self.first, self.start + 1)

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return self.stop - self.begin


def encode(tokenizer: Any, document: Document, *, bos: int | None, limit: int | None = None) -> Encoded:
    """Tokenise ``document`` without special tokens except the leading one, and count bytes token by token.

    Every byte of the text belongs to exactly one token. A character that several tokens make up belongs to
    the last of them, characters that the tokenizer drops to the token that follows (at the end: to the last
    one). Without offsets (a slow tokenizer) the characters are spread evenly over the document's tokens: exact
    for whole documents, an approximation where windows begin or ``limit`` cuts.

    Args:
        tokenizer: A transformers tokenizer.
        document: The document to tokenise.
        bos: The token to put first, or None.
        limit: Keep only the first ``limit`` tokens of the text.
    """
    text, fast = document.text, bool(tokenizer.is_fast)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = np.asarray(out["input_ids"], dtype=np.int64)
    ends = _character_ends(out["offset_mapping"], len(text)) if fast else _even_ends(len(ids), len(text))
    if limit is not None and len(ids) > limit:
        ids, ends = ids[:limit], ends[:limit]
    byte_ends = _bytes_before(text)[ends]
    if bos is not None:
        ids, byte_ends = np.insert(ids, 0, bos), np.insert(byte_ends, 0, 0)
    return Encoded(document, ids, byte_ends, int(ends[-1]) if len(ends) else 0, limit)


def _character_ends(offsets: Sequence[tuple[int, int]], characters: int) -> np.ndarray:
    """Return the number of characters that are complete after each token; int64 [T], non-decreasing."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T.copy()
    if len(ends):
        later_starts = np.minimum.accumulate(starts[::-1])[::-1]
        ends[:-1] = np.minimum(ends[:-1], later_starts[1:])  # not before the character's last token
        ends[-1] = characters
    return np.maximum.accumulate(ends)


def _even_ends(tokens: int, characters: int) -> np.ndarray:
    return np.arange(1, tokens + 1, dtype=np.int64) * characters // max(tokens, 1)


def _bytes_before(text: str) -> np.ndarray:
    """Return the UTF-8 bytes before each character and after the last, int64 [characters + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (code > 0x7F).astype(np.int64) + (code > 0x7FF) + (code > 0xFFFF)
    return np.concatenate([[0], np.cumsum(width)])


def windows_of(documents: Sequence[Encoded], context_length: int, stride: int | None = None) -> list[Window]:
    """Cut every document into windows; a document of a single token gives none.

    Args:
        documents: The documents to cut.
        context_length: Tokens per window.
        stride: None: windows do not overlap, and the first token of each is not scored. A number: each begins this many
            tokens after the previous one and scores the tokens beyond its end, so that every token but a document's
            first is scored once, with at least ``context_length - stride`` before it if the document has them.
    """
    found: list[Window] = []
    for index, document in enumerate(documents):
        reached, count = 0, len(document.ids)
        for start in range(0, count, stride or context_length):
            stop = min(start + context_length, count)
            window = Window(index, start, stop, reached if stride else 0)
            if window.scored > 0:
                found.append(window)
            reached = stop
            if stride and stop == count:
                break
    return found
