"""Clip the gradients of a gate's own parameters, which no wrapper of the model knows, with the model's or apart."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..lazy import torch

_TINY = 1e-6
"""The number that `torch.nn.utils.clip_grad_norm_` adds to a norm."""


def clip_factor(norm: float, most: float) -> float:
    """Return the factor by which gradients of this norm are multiplied to have a norm of at most ``most``."""
    return min(1.0, most / (norm + _TINY))


def clip_together(
    model: Iterable[torch.nn.Parameter], gate: Iterable[torch.nn.Parameter], norm: float, of_gate: float, most: float
) -> float:
    """Clip by the norm of all gradients, once the model's are clipped by their own, as if one call had had them all.

    Args:
        model: The model's parameters, whose gradients are clipped already.
        gate: The gate's parameters, with the same gradients on every rank.
        norm: The norm of the model's gradients before.
        of_gate: The norm of the gate's.
        most: The largest norm of all of them together.

    Returns:
        The norm of all gradients before clipping.
    """
    total = math.hypot(norm, of_gate)
    factor, done = clip_factor(total, most), clip_factor(norm, most)
    scale(gate, factor)
    if factor < done:
        scale(model, factor / done)
    return total


def scale(parameters: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Multiply the gradients, sharded or not."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
