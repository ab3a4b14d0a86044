"""What every readable checkpoint offers, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element of the dtypes of the safetensors format, by the format's own names."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that a dense parent's weights may have."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: The safetensors name of the dtype that `Checkpoint.read` returns, for example ``"BF16"``.
        shape: Its shape, as `Checkpoint.read` returns it.
        file: The file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as `Checkpoint.read` returns it."""
        return self.numel * DTYPE_BYTES[self.dtype]


class Checkpoint(Protocol):
    """A dense checkpoint, opened: headers are known, no tensor is in memory.

    Attributes:
        path: The folder (safetensors) or file (GGUF).
        config: The model's ``config.json`` as a dictionary in transformers' spelling.
        tensors: Every tensor by its transformers name.
        notes: Sentences for receipt and card about what reading changes (dequantised, ...).
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: list[str]

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, memory-mapped where the format allows it: never write to it."""
        ...

    def save_tokenizer(self, out: Path) -> list[str]:
        """Put tokenizer, generation config and chat template into ``out``; return the names of the files."""
        ...

    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes and file sizes (not of the weights): does a resume see the same source?"""
        ...
