"""Read just enough calibration text: each domain's documents as one stream of tokens."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.encoding import encode
from ..data.files import find_files
from ..data.text import Document, read_documents

LOOK_ROWS = 256
"""Number of leading rows from which the domains of a file are determined."""
CAP_SEQUENCES = 4
CAP_SHARE = 8
_CHARACTERS_PER_TOKEN = 16  # text beyond this is not tokenised at once: few tokens stand for more


FITTED = "text that a model was fitted to does not measure its quality"
"""The reason not to evaluate on it."""


def document_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a document's exact text (UTF-8)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shared_documents(used: Collection[str], documents: Iterable[Document]) -> tuple[str, ...]:
    """Name the files of documents whose exact text is among those used, for messages.

    Args:
        used: `document_hash` of documents, such as ``CalibrationText.document_hashes``.
        documents: Other documents, such as those to evaluate on.
    """
    return tuple(document.origin for document in documents if document_hash(document.text) in used)


def leading_bos(tokenizer: Any) -> int | None:
    """Return the beginning-of-sequence token that the tokenizer itself adds before a text, or None."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


@dataclass(frozen=True)
class Piece:
    """The beginning of one document.

    Attributes:
        ids: int32 [T], the leading token first if the tokenizer adds one; possibly more than will be used.
        byte_ends: int64 [T], bytes of text complete after each token.
        digest: `document_hash` of the whole document.
        file: The file that contains it.
    """

    ids: np.ndarray
    byte_ends: np.ndarray
    digest: str
    file: Path


@dataclass
class Pool:
    """One domain's documents, in order, as far as they have been read."""

    pieces: list[Piece] = field(default_factory=list)
    held: int = 0

    def add(self, piece: Piece) -> None:
        """Append a document (one without tokens is skipped)."""
        if not len(piece.ids):
            return
        self.pieces.append(piece)
        self.held += len(piece.ids)

    def size(self, cap: int | None, eos: int | None) -> int:
        """Return the tokens of the stream if each document contributes at most ``cap`` (None: no limit)."""
        if not self.pieces:
            return 0
        text = self.held if cap is None else sum(min(len(piece.ids), cap) for piece in self.pieces)
        return text + (len(self.pieces) - 1) * (eos is not None)

    def level(self, tokens: int, eos: int | None) -> int:
        """Return the most that one more document may have to contribute if at most ``tokens`` are needed in total.

        This is the lowest cap that would suffice if the next document were endless and the last.
        """
        return bisect_left(range(tokens), tokens, key=lambda cap: self.size(cap, eos) + cap)

    def take(self, tokens: int, cap: int, eos: int | None) -> tuple[np.ndarray, list[tuple[Piece, int]]]:
        """Return the first ``tokens`` of the stream: documents with ``eos`` between them.

        If the documents are too short under ``cap``, all of them may contribute more, up to the same higher cap, the
        lowest one that suffices.

        Returns:
            The ids, int64 [tokens], and each document that they come from with the number of its tokens.
        """
        longest = max((len(piece.ids) for piece in self.pieces), default=0)
        if self.size(cap, eos) < tokens <= self.size(None, eos):
            cap += bisect_left(range(cap, longest + 1), tokens, key=lambda c: self.size(c, eos))
        parts: list[np.ndarray] = []
        used: list[tuple[Piece, int]] = []
        left = tokens
        for piece in self.pieces:
            if parts and eos is not None and left > 0:
                parts.append(np.array([eos]))
                left -= 1
            if left <= 0:
                break
            ids = piece.ids[: min(cap, left)]
            parts.append(ids)
            used.append((piece, len(ids)))
            left -= len(ids)
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64), used


@dataclass
class _File:
    path: Path
    domain: str
    domains: frozenset[str] = frozenset()
    rows: Iterator[Document] | None = None

    def __post_init__(self) -> None:
        self.is_txt = self.path.name.endswith((".txt", ".txt.gz", ".txt.zst"))
        # A txt file is one document of a known domain: it can be skipped without being read.
        look = () if self.is_txt else islice(self.documents(), LOOK_ROWS)
        self.domains = frozenset(document.domain for document in look) or frozenset([self.domain])

    def documents(self) -> Iterator[Document]:
        for document in read_documents([self.path]):
            # A single txt file names its own domain; among several, the folder does.
            yield replace(document, domain=self.domain) if self.is_txt else document


class Reader:
    """Reads documents into the pools of their domains, continuing where it stopped.

    Reading of a file pauses when its domains (see `LOOK_ROWS`) have enough and continues if they later need
    more. Memory holds the tokens taken and, for long documents, a reserve in case there are too few others: for each
    domain at most a few times ``num_tokens``.

    Args:
        patterns: See `llamamoe.data.text.read_documents`.
        tokenizer: A transformers tokenizer.
        num_tokens: Number of tokens needed from all domains together.
    """

    def __init__(self, patterns: Sequence[str | Path], tokenizer: Any, num_tokens: int) -> None:
        self.files = [_File(path, domain) for path, domain in find_files(patterns)]
        self.tokenizer, self.num_tokens = tokenizer, num_tokens
        self.bos: int | None = leading_bos(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        names = dict.fromkeys(name for file in self.files for name in sorted(file.domains))
        self.pools = {name: Pool() for name in names}

    def fill(self, wanted: Mapping[str, int], length: int) -> None:
        """Read until each domain has ``wanted`` tokens with no document beyond its cap, or the files end."""
        caps = {domain: document_cap(tokens, length) for domain, tokens in wanted.items()}
        missing = {
            domain: tokens - self.pools[domain].size(caps[domain], self.eos) for domain, tokens in wanted.items()
        }
        for file in self.files:
            if file.rows is None and any(missing.get(domain, 0) > 0 for domain in file.domains):
                file.rows = file.documents()
            rows = file.rows or iter(())
            while any(missing.get(domain, 0) > 0 for domain in file.domains):
                document = next(rows, None)
                if document is None:
                    break
                domain = document.domain
                if missing.get(domain, 0) > 0:
                    pool = self.pools[domain]
                    piece = self._piece(document, file.path, pool, caps[domain])
                    missing[domain] -= min(len(piece.ids), caps[domain]) + (self.eos is not None and pool.held > 0)
                    pool.add(piece)

    def _piece(self, document: Document, file: Path, pool: Pool, cap: int) -> Piece:
        short = 4 * len(document.text) < cap  # a token is at least one of a character's four bytes
        limit = cap if short else max(cap, pool.level(self.num_tokens, self.eos))
        digest = document_hash(document.text)
        head = document.text[: limit * _CHARACTERS_PER_TOKEN]
        out = encode(self.tokenizer, replace(document, text=head), bos=self.bos, limit=limit)
        if len(out.ids) < limit and len(head) < len(document.text):
            out = encode(self.tokenizer, document, bos=self.bos, limit=limit)
        return Piece(out.ids[:limit].astype(np.int32), out.byte_ends[:limit], digest, file)


def document_cap(tokens: int, length: int) -> int:
    """Return the maximum number of tokens from one document: 4 sequences or 1/8 of ``tokens``, whichever is more."""
    return max(CAP_SEQUENCES * length, tokens // CAP_SHARE)
