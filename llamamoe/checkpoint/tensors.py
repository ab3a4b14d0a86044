"""Convert tensors between files and programs: dtypes, casts with one rounding, order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..lazy import torch
from ..numerics import is_power_of_two
from .base import TORCH_NAMES


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype.

    Raises:
        ValueError: It has none here.
    """
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
             torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
    if dtype not in names:
        raise ValueError(f"{dtype} cannot be stored in a safetensors file here")
    return names[dtype]


def cast(tensor: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Scale and cast a tensor with one rounding; return the tensor itself if there is nothing to do."""
    if scale == 1.0:
        return tensor.to(dtype)
    if is_power_of_two(scale):
        return tensor.to(dtype) * scale
    wide = max(tensor.dtype.itemsize, dtype.itemsize) > 4  # a product in float32 would round before the cast to float64
    return (tensor.double() if wide else tensor.float()).mul(scale).to(dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: more do not speed up moving bytes, and idle OpenMP threads spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Re-order the rows of each head from two halves (Llama's rotary pairs) to neighbouring pairs."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(tensor.shape)


def to_halves(tensor: torch.Tensor, heads: int, turned: float = 1.0) -> torch.Tensor:
    """Undo `interleave` in the first rows of each head, a share of ``turned``; the result is contiguous."""
    rest = tensor.shape[1:]
    by_head = tensor.reshape(heads, -1, *rest)
    count = int(by_head.shape[1] * turned)
    halves = by_head[:, :count].reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(heads, count, *rest)
    return torch.cat([halves, by_head[:, count:]], 1).reshape(tensor.shape)


def nonfinite(tensor: torch.Tensor) -> bool:
    """Return whether any value is NaN or infinite, in one pass without allocation."""
    if tensor.numel() == 0:
        return False
    low, high = torch.aminmax(tensor)  # both are NaN if any value is
    return not bool(torch.isfinite(low) & torch.isfinite(high))
