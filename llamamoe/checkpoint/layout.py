"""Where tensors lie in the shards that are written: known before the first byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shards = dict[str, dict[str, tuple[str, tuple[int, ...], int]]]
"""file name -> tensor name -> (dtype, shape, bytes), in file order."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: file name, byte offset in the file, bytes."""

    file: str
    offset: int
    nbytes: int


def shard_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, dict[str, int]]:
    """Header of a shard and the offset of each tensor in the file.

    Args:
        tensors: name to (dtype, shape, bytes), in the order in which they lie in the file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, starts = 0, {}
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        starts[name] = offset
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}
