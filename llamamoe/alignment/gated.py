"""A dense FFN whose neurons are switched on and off token by token, as its experts would be: one dense step in time.

``y = down (g * act(gate x) * (up x))`` with ``g = s * V M^T``: V ``[B, C]`` says what each place counts for a token, M
``[F, C]`` at which place a neuron is, s ``[F]`` scales its output. The weights stay the parent's and get no gradient; V, M
and s do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..lazy import torch, transformers
from ..methods.layer import FfnWeights
from ..methods.solvers.transport import soft_top_k

LEAST_SPREAD = 1e-6
"""Logits of the router that differ less than this count as if they differed so much."""


@dataclass
class Choices:
    """How the tokens of one layer choose, at one step.

    Attributes:
        rows_NH: The router's rows, float32.
        assignment_FC: M, float32: one-hot, or any plan.
        top_k: Experts per token.
        coefficient: What a selected expert's output is multiplied by.
        temperature: Of the soft choice that gradients pass through, in units of the logits' spread.
        scales_F: float32, s; None for ones.
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
        """V, float32 ``[B, C]``: the selected experts' coefficient, 1 for shared neurons, 0 for omitted ones.

        Forward the k largest logits; backward the threshold function of `soft_top_k`.
        """
        num_experts = len(self.rows_NH)
        fixed_B2 = x_BH.new_tensor([1.0, 0.0], dtype=self.rows_NH.dtype).expand(len(x_BH), 2)
        if not num_experts:
            return fixed_B2
        logits_BN = x_BH.to(self.rows_NH.dtype) @ self.rows_NH.T
        hard_BN = torch.zeros_like(logits_BN).scatter_(1, logits_BN.detach().topk(self.top_k, dim=1).indices, 1.0)
        if torch.is_grad_enabled():
            soft_BN = soft_top_k(logits_BN / (self.temperature * _spread(logits_BN)), self.top_k)
            hard_BN = soft_BN if self.relaxed else hard_BN + soft_BN - soft_BN.detach()
        return torch.cat([self.coefficient * hard_BN, fixed_B2], 1)


def _spread(logits_BN: torch.Tensor) -> torch.Tensor:
    logits = logits_BN.detach()
    deviation = (logits - logits.mean(1, keepdim=True)).square().mean().sqrt()
    return deviation.clamp(min=LEAST_SPREAD)


class GatedFfn(torch.nn.Module):
    """The FFN of one layer: the parent's while ``choices`` is None, else gated by them, with weights that may be others.

    Args:
        ffn: The parent's weights; they are moved, not copied, where device and dtype are theirs already.
        device: Where to compute.
        dtype: Of the large products.
    """

    def __init__(self, ffn: FfnWeights, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.parent = tuple(m.to(device, dtype) for m in (ffn.gate_FH, ffn.up_FH, ffn.down_HF))
        self._act = transformers.activations.ACT2FN[ffn.hidden_act]
        self.choices: Choices | None = None

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """``[B, S, H]`` to the same."""
        x_BH = x_BSH.flatten(0, -2)
        if self.choices is None:
            gate_FH, up_FH, down_HF = self.parent
            y_BH: torch.Tensor = (self._act(x_BH @ gate_FH.T) * (x_BH @ up_FH.T)) @ down_HF.T
            return y_BH.view_as(x_BSH)
        choices = self.choices
        places_FC = choices.assignment_FC
        if choices.scales_F is not None:
            places_FC = places_FC * choices.scales_F[:, None]
        weights = self.parent if choices.weights is None else [w.to(x_BH.dtype) for w in choices.weights]
        out: torch.Tensor = _Gated.apply(x_BH, choices.values(x_BH), places_FC, *weights, self._act)  # type: ignore[no-untyped-call]
        return out.view_as(x_BSH)


class _Gated(torch.autograd.Function):
    """The gated product, which keeps two ``[B, F]`` tensors for the way back and makes the others again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BH: torch.Tensor,
        values_BC: torch.Tensor,
        places_FC: torch.Tensor,
        gate_FH: torch.Tensor,
        up_FH: torch.Tensor,
        down_HF: torch.Tensor,
        act: Any,
    ) -> torch.Tensor:
        a_BF, u_BF = x_BH @ gate_FH.T, x_BH @ up_FH.T
        ctx.save_for_backward(x_BH, a_BF, u_BF, values_BC, places_FC, gate_FH, up_FH, down_HF)
        ctx.act = act
        g_BF = values_BC.to(a_BF.dtype) @ places_FC.to(a_BF.dtype).T
        return g_BF.mul_(act(a_BF)).mul_(u_BF) @ down_HF.T

    @staticmethod
    def backward(ctx: Any, grad_BH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BH, a_BF, u_BF, values_BC, places_FC, gate_FH, up_FH, down_HF = ctx.saved_tensors
        needs = ctx.needs_input_grad
        values, places = values_BC.to(a_BF.dtype), places_FC.to(a_BF.dtype)
        with torch.enable_grad():
            leaf = a_BF.detach().requires_grad_()
            act_BF = ctx.act(leaf)
        h_BF = act_BF.detach() * u_BF
        at_gh_BF = grad_BH @ down_HF
        g_BF = values @ places.T
        at_down = grad_BH.T @ (g_BF * h_BF) if needs[5] else None
        at_h_BF, at_g_BF = g_BF.mul_(at_gh_BF), at_gh_BF.mul_(h_BF)
        at_values = (at_g_BF @ places).to(values_BC.dtype) if needs[1] else None
        at_places = (at_g_BF.T @ values).to(places_FC.dtype) if needs[2] else None
        (at_a_BF,) = torch.autograd.grad(act_BF, leaf, at_h_BF * u_BF)
        at_u_BF = at_h_BF.mul_(act_BF.detach())
        at_gate, at_up = (at.T @ x_BH if need else None for at, need in ((at_a_BF, needs[3]), (at_u_BF, needs[4])))
        at_x = at_a_BF @ gate_FH + at_u_BF @ up_FH if needs[0] else None
        return at_x, at_values, at_places, at_gate, at_up, at_down, None
