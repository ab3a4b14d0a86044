"""Write tensors into a GGUF file, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ...errors import LlamaMoeError
from ...lazy import gguf, np, torch
from ...progress import Progress, ProgressCallback
from ..files import replacing_path

DTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""llama.cpp's file type for each main tensor type."""
Q8_BLOCK = 32
"""Number of elements of a row that share a scale in Q8_0."""
_Q8_BYTES = 34
_KINDS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}


@dataclass(frozen=True)
class GgufOut:
    """One tensor of the file: its shape, its type, and the function that makes it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], torch.Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        count = prod(self.shape)
        return count * 4 if self.kind == "F32" else count * 2 if self.kind != "Q8_0" else count // Q8_BLOCK * _Q8_BYTES


def kind_of(dtype: str, stored: str, shape: tuple[int, ...]) -> str:
    """Return the GGUF type of a tensor."""
    if len(shape) == 1:
        return "F32"
    kind = _KINDS.get(stored if dtype == "auto" else dtype, "F32")
    return "F16" if kind == "Q8_0" and shape[-1] % Q8_BLOCK else kind


def write_tensors(
    writer: gguf.GGUFWriter,
    tensors: Sequence[GgufOut],
    out: Path,
    progress: ProgressCallback,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the file, under another name beside OUT until it is complete and ``check`` has passed."""
    for each in tensors:
        kind = gguf.GGMLQuantizationType[each.kind]
        # The dtype only distinguishes packed from plain shapes: `kind` is stored.
        writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.nbytes, raw_dtype=kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_path(out) as unfinished:
            writer.write_header_to_file(unfinished)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, each in enumerate(tensors, start=1):
                writer.write_tensor_data(_packed(each))
                progress(Progress("export", done, len(tensors), "tensor", each.name))
            writer.close()
            check()
    except OSError as error:
        raise LlamaMoeError(
            f"writing {out} failed: {error.strerror or error}.",
            hint="Nothing is left of it; fix the cause and repeat.",
        ) from error
    finally:
        writer.close()


def _packed(tensor: GgufOut) -> np.ndarray[Any, Any]:
    """Return the numbers as the file stores them."""
    value = tensor.make()
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}
    cast = value.to(dtypes[tensor.kind]).contiguous()
    if not torch.isfinite(cast).all():
        raise LlamaMoeError(
            f"{tensor.name} would hold NaN or infinite values as {tensor.kind}.",
            hint="With --dtype f16 the values are beyond its range: use bf16 or f32."
            if torch.isfinite(value).all()
            else "The checkpoint already contains them.",
        )
    if tensor.kind == "Q8_0":
        packed: np.ndarray[Any, Any] = gguf.quants.quantize(cast.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return packed
    plain: np.ndarray[Any, Any] = (cast.view(torch.int16) if tensor.kind == "BF16" else cast).numpy()
    return plain
