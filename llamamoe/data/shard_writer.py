"""Write shards of token ids: raw, little endian, hashed while they are written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import open_append, sync_path
from .token_index import DomainEntry, ShardEntry

BUFFER_TOKENS = 1 << 20
"""Number of tokens of one domain that are buffered in memory."""


class DomainWriter:
    """The shards of one domain of one split of one unit, split at the maximum length."""

    def __init__(self, folder: Path, place: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.dtype = dtype.newbyteorder("<")
        self._folder, self._place, self._most = folder, place, shard_tokens
        self._waiting: list[np.ndarray] = []
        self._held = self._documents = self._bytes = self._largest = 0
        self._shards: list[ShardEntry] = []
        self._digest, self._length = hashlib.sha256(), 0
        (folder / place).mkdir(parents=True)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document."""
        self._waiting.append(ids)
        self._held += len(ids)
        self._documents += 1
        self._bytes += text_bytes
        self._largest = max(self._largest, int(ids.max()))
        if self._held >= BUFFER_TOKENS:
            self._flush()

    def close(self) -> DomainEntry:
        """Write the buffered tokens, and return the entry of the domain."""
        self._flush()
        if self._length:
            self._end_shard()
        sync_path(self._folder / self._place)
        return DomainEntry(
            documents=self._documents,
            tokens=sum(shard.tokens for shard in self._shards),
            text_bytes=self._bytes,
            largest_id=self._largest,
            shards=tuple(self._shards),
        )

    @property
    def _file(self) -> str:
        return f"{self._place}/{len(self._shards):05d}.bin"

    def _flush(self) -> None:
        ids = np.concatenate(self._waiting) if self._waiting else np.empty(0, self.dtype)
        self._waiting, self._held = [], 0
        while len(ids):
            piece, ids = np.split(ids, [min(self._most - self._length, len(ids))])
            data = piece.astype(self.dtype, copy=False).tobytes()
            with open_append(self._folder / self._file) as file:  # not held open: there may be thousands of domains
                file.write(data)
            self._digest.update(data)
            self._length += len(piece)
            if self._length == self._most:
                self._end_shard()

    def _end_shard(self) -> None:
        sync_path(self._folder / self._file)
        entry = ShardEntry(file=self._file, tokens=self._length, sha256=self._digest.hexdigest())
        self._shards.append(entry)
        self._digest, self._length = hashlib.sha256(), 0
