"""Plan the position of tensors in the shards before the first byte is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..lazy import huggingface_hub
from .base import TensorInfo

SHARD_SIZE = r"([0-9]{0,8}[1-9][0-9]{0,8}(\.[0-9]+)?|[0-9]{1,9}\.[0-9]*[1-9][0-9]*)\s*[KMGT]B"
SHARD_SIZE_RULE = "must be a size above 0 with its unit, such as 5GB or 500MB"
"""The rule for the maximum size of a file."""
Shards = dict[str, dict[str, tuple[str, tuple[int, ...], int]]]
"""Shards: file name -> tensor name -> (dtype, shape, bytes), in file order."""


def as_stored(tensors: Mapping[str, TensorInfo]) -> Shards:
    """Return the files of a checkpoint with the tensors that each holds, in the order of ``tensors``."""
    found: Shards = {}
    for name, info in tensors.items():
        found.setdefault(info.file.name, {})[name] = (info.dtype, info.shape, info.nbytes)
    return found


@dataclass(frozen=True)
class Slot:
    """The position of a tensor: file name, byte offset in the file, bytes."""

    file: str
    offset: int
    nbytes: int


def shard_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], facts: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a shard and the offset of each tensor in the file.

    Args:
        tensors: Name to (dtype, shape, bytes), in file order.
        facts: Further entries of the header's ``__metadata__``.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(facts or {})}}
    offset, starts = 0, {}
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        starts[name] = offset
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def check_size(shard_size: str) -> None:
    """Check that ``shard_size`` is a valid file size.

    Raises:
        UsageError: The size is invalid.
    """
    if not re.fullmatch(SHARD_SIZE, shard_size):
        raise UsageError(f"shard_size = {shard_size!r} {SHARD_SIZE_RULE}.")


def deal(entries: Mapping[str, tuple[str, tuple[int, ...], int]], shard_size: str) -> Shards:
    """Distribute tensors in order among files of at most ``shard_size`` (such as ``"5GB"``), with transformers' names.

    Raises:
        UsageError: ``shard_size`` is invalid.
    """
    check_size(shard_size)

    split = huggingface_hub.split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry[2],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size.replace(" ", ""),
    )
    return {file: {name: entries[name] for name in names} for file, names in split.filename_to_tensors.items()}


def index_json(shards: Mapping[str, Mapping[str, tuple[str, tuple[int, ...], int]]]) -> dict[str, Any]:
    """Return the content of ``model.safetensors.index.json``."""
    return {
        "metadata": {"total_size": sum(n for tensors in shards.values() for _, _, n in tensors.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
