"""The contract of a measure of sensitivity: what the model loses when one layer alone is converted."""

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
    """What is measured, on which text and where.

    Attributes:
        plans: Conversions of every layer with different shares of active neurons, ascending; no layer stays dense.
        shares: Their active multiply-adds per FFN, over the dense FFN's.
        text: The calibration text.
        compute: Device and dtype of large products.
        folder: An empty folder for hidden states that are too large for memory, and gradients.
        held_out_tokens: Most tokens on which outputs are compared.
        progress: Told after every layer.
        batch_tokens: Tokens that run together.
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
        """What norms and attention are rounded to, because they will be stored so."""
        from ....checkpoint.tensors import torch_dtype

        return torch_dtype(self.plans[0].dtype)

    def walk(self, text: CalibrationText, gradients: GradientStore | None = None) -> Walk:
        """A walk through the dense parent, at its start."""
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
    """Measures what is lost when one layer alone is converted, every other one being the parent's.

    Attributes:
        unit: What the damage is counted in. Damages of several layers are added up, which is right to first order.
        converts: Whether layers are converted by the recipe's own method, at every planned share.
    """

    unit: ClassVar[str]
    converts: ClassVar[bool]

    @abstractmethod
    def measure(self, task: Task) -> Curves:
        """The damage of every layer at several shares.

        Raises:
            LlamaMoeError: Values are not finite, or there is too little text.
        """

    @abstractmethod
    def flops(self, task: Task) -> int:
        """Estimate of the floating-point operations of `measure`."""


def pass_flops(plan: SplitPlan) -> int:
    """Floating-point operations of one token in one dense layer, attention scores left out."""
    spec = plan.model.spec
    attention = 2 * spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    return attention + 6 * spec.intermediate_size * spec.hidden_size
