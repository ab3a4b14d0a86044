"""transformers' own grouped products, in the dtype that autocast asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation
from .sorted_loop import Sorted


@dataclass(frozen=True)
class _Experts:
    """What transformers' function looks at: plain SwiGLU experts; indices outside of them are not selected."""

    call: ExpertsCall
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    has_post_expert_norm: bool = False
    _is_expert_parallel: bool = True

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

    torch's grouped product is unknown to autocast: with float32 weights transformers' default runs experts in float32,
    on GPUs many times slower than the rest of the model. Here weights and inputs are cast first, as autocast does for
    every other product, and the master weights get their gradients through the cast.
    """

    name = "grouped_mm"
    summary = "transformers' grouped products, in bfloat16 under autocast: for GPUs"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`.

        torch's product knows no float64, and only rows of whole 16 bytes: elsewhere experts are run one by one.
        """
        size = call.x_TH.element_size()
        if size > 4 or call.width * size % 16 or call.hidden_size * size % 16:
            return Sorted().forward(call)
        from transformers.integrations.moe import grouped_mm_experts_forward

        function: Any = grouped_mm_experts_forward
        out_TH: torch.Tensor = function(_Experts(call), call.x_TH, call.known_indices_Tk(), call.weights_Tk)
        return out_TH
