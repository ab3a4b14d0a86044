"""Sums in float64, on devices that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def wide(values: torch.Tensor) -> torch.Tensor:
    """The same in float64; in float32 on Apple's GPUs (mps), which have nothing wider."""
    return values.float() if values.device.type == "mps" else values.double()
