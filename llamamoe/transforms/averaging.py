"""Average one tensor of several checkpoints, block by block."""

from __future__ import annotations

from collections.abc import Sequence

from ..architectures.expert_weighting import is_routed_down, is_router
from ..checkpoint.base import FLOAT_DTYPES
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.tensors import torch_dtype
from ..errors import RefusedError
from ..lazy import torch

_BLOCK = 1 << 24
"""Number of elements averaged at once: 64 MiB of float32 for each model plus the same for the result."""
_APART = 10.0
"""Ratio from which two routers' rows count as different in scale: a hard and a trained one."""


def average(
    checkpoints: Sequence[SafetensorsCheckpoint], shares: Sequence[float], factors: Sequence[float], name: str
) -> torch.Tensor:
    """Return the average of a tensor, in the dtype of the first checkpoint; see `llamamoe.merge`.

    Args:
        checkpoints: The checkpoints.
        shares: Weight of each of them.
        factors: Factor of each one's routed down projections.
        name: Name of the tensor.

    Raises:
        RefusedError: It holds whole numbers that differ.
    """
    info = checkpoints[0].tensors[name]
    if info.dtype not in FLOAT_DTYPES:
        first = checkpoints[0].read(name)
        if any(not torch.equal(each.read(name), first) for each in checkpoints[1:]):
            raise RefusedError(f"{name} holds whole numbers and differs between the models.")
        return first.contiguous()
    dtype = torch_dtype(info.dtype)
    wide = torch.float32 if dtype.itemsize < 4 else torch.float64
    if is_router(name):
        factors = _temperatures([each.read(name).to(wide) for each in checkpoints])
    elif not is_routed_down(name):
        factors = (1.0,) * len(checkpoints)
    out = torch.empty(info.shape, dtype=dtype)
    count = info.shape[0]
    step = max(1, _BLOCK * count // max(1, info.numel))
    for at in range(0, count, step):
        rows = at, min(count, at + step)
        blocks = (each.read(name, rows).to(wide) for each in checkpoints)
        start, *others = (_scaled(block, factor) for block, factor in zip(blocks, factors, strict=True))
        total = start.clone()
        for value, share in zip(others, shares[1:], strict=True):
            total += (value - start).mul_(share)
        out[slice(*rows)] = total.to(dtype)
    return out


def _scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    return values if factor == 1.0 else values * factor


def _temperatures(rows: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Return the factor of each model's router rows in a layer: 1, except for those much smaller than others."""
    sizes = [float(each.double().square().mean().sqrt()) for each in rows]
    largest = max(sizes)
    return tuple(largest / size if 0 < size * _APART < largest else 1.0 for size in sizes)
