"""The interface of a measure of sensitivity: the model's damage if a single layer is converted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ....calibration.compute import Compute
from ....calibration.gradients import GradientStore
from ....calibration.walk import Walk
from ....conversion.plan import SplitPlan
from ....lazy import torch
from ....methods.layer import BATCH_TOKENS
from ....plugins import Plugin
from ....progress import ProgressCallback, ignore_progress
from .curves import Curves

if TYPE_CHECKING:
    from ....calibration.text import CalibrationText


@dataclass(frozen=True)
class Task:
    """The conversions to measure, the text and the device.

    Attributes:
        plans: Conversions of every layer with different shares of active neurons, ascending; no layer stays dense.
        shares: Their active multiply-adds per FFN, over the dense FFN's.
        text: The calibration text.
        compute: Device and dtype of large products.
        folder: An empty folder for hidden states that are too large for memory, and gradients.
        held_out_tokens: Maximum number of tokens on which outputs are compared.
        progress: Called after every layer.
        batch_tokens: Tokens per batch.
    """

    plans: tuple[SplitPlan, ...]
    shares: tuple[float, ...]
    text: CalibrationText
    compute: Compute
    folder: Path
    held_out_tokens: int = 4096
    progress: ProgressCallback = ignore_progress
    batch_tokens: int = BATCH_TOKENS

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype to which norms and attention are rounded, because they will be stored in it."""
        from ....checkpoint.tensors import torch_dtype

        return torch_dtype(self.plans[0].dtype)

    def walk(self, text: CalibrationText, gradients: GradientStore | None = None) -> Walk:
        """Return a walk through the dense parent, at its start."""
        from ....calibration.walk import Walk

        plan = self.plans[0]
        assert plan.calibration is not None
        mapped = plan.calibration.input_place != "memory"
        walk = Walk(
            plan.model,
            text,
            self.compute,
            weights_dtype=self.weights_dtype,
            folder=self.folder if mapped else None,
            map_inputs=mapped,
            gradients=gradients,
            batch_tokens=self.batch_tokens,
        )
        walk.start()
        return walk


class Sensitivity(Plugin, ABC):
    """A measure of the damage if a single layer is converted and all others are the parent's.

    Attributes:
        unit: Unit of the damage. Damages of several layers are added up, which is correct to first order.
        converts: Whether layers are converted by the recipe's own method, at every planned share.
    """

    unit: ClassVar[str]
    converts: ClassVar[bool]

    @abstractmethod
    def measure(self, task: Task) -> Curves:
        """Return the damage of every layer at several shares.

        Raises:
            LlamaMoeError: Values are not finite, or there is too little text.
        """

    @abstractmethod
    def flops(self, task: Task) -> int:
        """Return an estimate of the floating-point operations of `measure`."""


def pass_flops(plan: SplitPlan) -> int:
    """Return the floating-point operations of one token in one dense layer, without attention scores."""
    spec = plan.model.spec
    attention = 2 * spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    return attention + 6 * spec.intermediate_size * spec.hidden_size
