"""The interface of readable checkpoints, whatever their file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from ..lazy import torch

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element of the dtypes of the safetensors format, by the format's own names."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
"""Torch's names of the same dtypes."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that a dense parent's weights may have."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: The safetensors name of the dtype that `Checkpoint.read` returns, for example ``"BF16"``.
        shape: Its shape, as `Checkpoint.read` returns it.
        file: The file that holds it.
        offset: The byte of the file at which it begins.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as `Checkpoint.read` returns it."""
        return self.numel * DTYPE_BYTES[self.dtype]


class Checkpoint(Protocol):
    """An open dense checkpoint: headers have been read, no tensor is in memory.

    Attributes:
        path: The folder (safetensors) or file (GGUF).
        config: The model's ``config.json`` as a dictionary in transformers' spelling.
        tensors: Every tensor by its transformers name.
        notes: Sentences for receipt and card about changes on reading (dequantised, ...).
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: list[str]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read a tensor, or the rows from the first to before the second of ``rows``, into fresh memory on the CPU.

        Raises:
            LlamaMoeError: The file was changed since the checkpoint was opened, or cannot be read.
        """
        ...

    def save_tokenizer(self, out: Path) -> list[str]:
        """Put tokenizer, generation config and chat template into ``out``; return the names of the files."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, dtypes and file sizes (not of the weights), which a resume compares."""
        ...

    def check_unchanged(self) -> None:
        """Check that no file changed since the checkpoint was opened; called before a result is published.

        Raises:
            LlamaMoeError: A file was written, replaced, removed or added since.
        """
        ...
