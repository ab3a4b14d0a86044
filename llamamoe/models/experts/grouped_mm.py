"""Run transformers' own grouped products in the dtype of autocast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...lazy import torch, transformers
from .base import ExpertsCall, ExpertsImplementation
from .sorted_loop import Sorted

ROW_BYTES = 16
"""torch's grouped product takes matrices whose rows are a multiple of this long."""


def rows_fit(model: torch.nn.Module) -> bool:
    """Return whether torch's grouped product takes the matrices of all experts of a model, in their dtype."""
    found = (getattr(module, name, None) for module in model.modules() for name in ("gate_up_proj", "down_proj"))
    stacked = [each for each in found if isinstance(each, torch.nn.Parameter) and each.ndim == 3]
    return not any(each.shape[-1] * each.element_size() % ROW_BYTES for each in stacked)


@dataclass(frozen=True)
class _Experts:
    """The attributes that transformers' function reads: plain SwiGLU experts.

    If only these experts are selected, it need not mask the outputs of others, which costs three passes over all
    assignments.
    """

    call: ExpertsCall
    _is_expert_parallel: bool
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_post_expert_norm: bool = False

    @property
    def num_experts(self) -> int:
        return self.call.num_experts

    @property
    def gate_up_proj(self) -> torch.Tensor:
        return self.call.gate_up

    @property
    def down_proj(self) -> torch.Tensor:
        return self.call.down

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.call.activate(gate_up)


class GroupedMm(ExpertsImplementation):
    """One grouped product for all experts, as transformers' default computes it on GPUs.

    autocast does not cover torch's grouped product: with float32 weights transformers' default runs experts in float32,
    on GPUs many times slower than the rest of the model. Here weights and inputs are cast first, as autocast does for
    every other product, and the master weights get their gradients through the cast.
    """

    name = "grouped_mm"
    summary = "transformers' grouped products, in bfloat16 under autocast: for GPUs"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`.

        torch's product does not support float64, and needs rows of multiples of 16 bytes: else experts run one by one.
        """
        size = call.x_TH.element_size()
        if size > 4 or call.width * size % ROW_BYTES or call.hidden_size * size % ROW_BYTES:
            return Sorted().forward(call)
        function: Any = transformers.integrations.moe.grouped_mm_experts_forward
        known = call.all_known()
        indices_Tk = call.indices_Tk if known else call.known_indices_Tk()
        out_TH: torch.Tensor = function(_Experts(call, not known), call.x_TH, indices_Tk, call.weights_Tk)
        return out_TH
