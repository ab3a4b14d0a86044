"""Selection of a layer's experts by its tokens: hard forward, soft backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..lazy import torch
from ..methods.solvers.learned_assignment import hard_top_k, spread_of
from ..methods.solvers.transport import soft_top_k


@dataclass
class Choices:
    """The selection rule of one layer at one step.

    Attributes:
        rows_NH: The router's rows, float32.
        assignment_FC: M, float32: one-hot, or any plan.
        top_k: Experts per token.
        coefficient: Factor of a selected expert's output.
        temperature: Temperature of the soft choice that gradients pass through, in units of the logits' spread.
        scales_F: float32, s; None means all ones.
        weights: gate, up and down in the place of the parent's, float32; None for the parent's.
        relaxed: Use the soft choice forward too: only for checking gradients.
    """

    rows_NH: torch.Tensor
    assignment_FC: torch.Tensor
    top_k: int
    coefficient: float
    temperature: float
    scales_F: torch.Tensor | None = None
    weights: Sequence[torch.Tensor] | None = None
    relaxed: bool = False

    def values(self, x_BH: torch.Tensor) -> torch.Tensor:
        """Return V, float32 ``[B, C]``: the selected experts' coefficient, 1 for shared neurons, 0 for omitted ones.

        Forward the k largest logits; backward the threshold function of `soft_top_k`.
        """
        num_experts = len(self.rows_NH)
        fixed_B2 = x_BH.new_tensor([1.0, 0.0], dtype=self.rows_NH.dtype).expand(len(x_BH), 2)
        if not num_experts:
            return fixed_B2
        logits_BN = x_BH.to(self.rows_NH.dtype) @ self.rows_NH.T
        hard_BN = hard_top_k(logits_BN, self.top_k)
        if torch.is_grad_enabled():
            soft_BN = soft_top_k(logits_BN / (self.temperature * spread_of(logits_BN)), self.top_k)
            hard_BN = soft_BN if self.relaxed else hard_BN + soft_BN - soft_BN.detach()
        return torch.cat([self.coefficient * hard_BN, fixed_B2], 1)
