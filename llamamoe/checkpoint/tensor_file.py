"""Write a whole safetensors file tensor by tensor, and hash it on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ..lazy import torch
from .files import replacing
from .layout import shard_header
from .manifest import FileEntry
from .tensors import dtype_name
from .writer import tensor_bytes

_PIECE = 2**24
"""Bytes that are hashed and then written, so that they are still in the processor's cache."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str] | None = None) -> FileEntry:
    """Write a safetensors file, whole or not at all; see `llamamoe.checkpoint.files.replacing`.

    Tensors may be on any device and have any strides: one at a time is copied, if it must be.

    Args:
        path: The name that the file gets.
        tensors: The tensors by name; those of wider elements are stored first.
        facts: Entries of the header's ``__metadata__``.

    Returns:
        Size and SHA-256 of what was written; the bytes are on disk.

    Raises:
        OSError: The file cannot be written.
        ValueError: A dtype cannot be stored.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each starts at its alignment
    layout = {
        name: (dtype_name(value.dtype), tuple(value.shape), value.numel() * value.element_size())
        for name, value in ordered
    }
    digest, nbytes = hashlib.sha256(), 0
    with replacing(path) as file:

        def put(view: memoryview | bytes) -> None:
            nonlocal nbytes
            digest.update(view)
            file.write(view)
            nbytes += len(view)

        put(shard_header(layout, facts)[0])
        for _, value in ordered:
            _in_pieces(tensor_bytes(value.detach().cpu().contiguous()), put)
    return FileEntry(nbytes, digest.hexdigest())


def _in_pieces(view: memoryview, put: Callable[[memoryview], None]) -> None:
    for start in range(0, len(view), _PIECE):
        put(view[start : start + _PIECE])
