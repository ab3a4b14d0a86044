"""A dense FFN whose neurons are gated token by token as its experts would be, in the time of the dense FFN.

``y = down (g * act(gate x) * (up x))`` with ``g = s * V M^T``: V ``[B, C]`` weighs each place for a token, M
``[F, C]`` holds each neuron's place, s ``[F]`` scales its output. The weights stay the parent's and get no gradient; V,
M and s do.
"""

from __future__ import annotations

from typing import Any

from ..lazy import torch, transformers
from ..methods.layer import FfnWeights
from .choices import Choices


class GatedFfn(torch.nn.Module):
    """The FFN of one layer: the parent's while ``choices`` is None, else gated by them, possibly with other weights.

    Args:
        ffn: The parent's weights; they are not copied if they already have this device and dtype.
        device: Device of the computation.
        dtype: Dtype of the large products.
    """

    def __init__(self, ffn: FfnWeights, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.parent = tuple(m.to(device, dtype) for m in (ffn.gate_FH, ffn.up_FH, ffn.down_HF))
        self._act = transformers.activations.ACT2FN[ffn.hidden_act]
        self.choices: Choices | None = None

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Apply the FFN to ``[B, S, H]``, keeping the shape."""
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
    """The gated product, which keeps two ``[B, F]`` tensors for the backward pass and recomputes the others."""

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
