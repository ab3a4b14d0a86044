"""Read untrusted safetensors headers and check them, without torch.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .base import DTYPE_BYTES, TensorInfo
from .json_files import unique_keys
from .paths import refuse_pointer

MAX_HEADER_BYTES = 100_000_000
"""Maximum header size, that of the reference implementation."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, in the order of the header. O(header), no tensor is read.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or its header is not consistent with it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            refuse_pointer(path, start + file.read(64) if start == b"version " else start)
            length = int.from_bytes(start, "little")
            if not size:
                raise CheckpointError(f"{path.name} is empty (0 bytes).", hint="Download it again.")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path.name}: the header claims {length:,} bytes, but the file has {size:,}: it is truncated or not a "
                    "safetensors file.",
                    hint="Download it again.",
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
        facts = header.pop("__metadata__", None)
        if facts is not None and not (
            isinstance(facts, dict) and all(isinstance(each, str) for each in facts.values())
        ):
            raise ValueError("__metadata__ must be a mapping to text")
        return _tensors(path, header, 8 + length, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name}: the header is not valid ({error}).", hint="Download it again.") from None


def _tensors(path: Path, header: dict[str, Any], data_start: int, data_bytes: int) -> dict[str, TensorInfo]:
    found, spans = {}, []
    for name, entry in header.items():
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"{name}: sizes must be whole numbers")
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: unknown dtype {dtype!r}")
        if stop - start != prod(shape) * DTYPE_BYTES[dtype]:
            raise ValueError(f"{name}: {stop - start} bytes do not hold {dtype} {list(shape)}")
        spans.append((start, stop, name))
        found[name] = TensorInfo(dtype, shape, path, data_start + start)
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"{name}: there is a gap or an overlap before it")
        end = stop
    if end != data_bytes:
        raise CheckpointError(
            f"{path.name}: the tensors take {end:,} bytes, but the file holds {data_bytes:,}: it is "
            f"{'truncated' if data_bytes < end else 'longer than its header states'}.",
            hint="Download it again.",
        )
    return found
