"""Weights that never change."""

from __future__ import annotations

from typing import ClassVar

from ....lazy import np
from .base import MixtureUpdate


class Static(MixtureUpdate):
    """A control: the weights do not change. With Sheared-LLaMA's numbers it is the best that LLaMA-MoE found."""

    name = "static"
    summary = "the weights stay as they are"
    dynamic: ClassVar[bool] = False

    def rule(self, weights_D: np.ndarray, losses_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        """See `MixtureUpdate.rule`."""
        normal_D: np.ndarray = weights_D / weights_D.sum()
        return normal_D
