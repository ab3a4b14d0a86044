"""The interface of an experts implementation, which computes and sums a token's weighted experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import RefusedError
from ...lazy import torch


@dataclass(frozen=True)
class ExpertsCall:
    """The input for T tokens, all in one dtype: that of the inputs, or autocast's.

    Attributes:
        x_TH: The inputs.
        indices_Tk: int64, the selected experts; values outside ``0 .. N - 1`` (another rank's expert, padding) count
            as not selected.
        weights_Tk: Factors of the selected experts' outputs.
        gate_up: ``[N, 2W, H]``, the gate rows of an expert before its up rows.
        down: ``[N, H, W]``.
        activate: Maps the last axis ``[gate, up]`` to ``act(gate) * up``, half as long, for any length.
        partial: Whether the module holds only a part of the experts, so that others may be selected.
    """

    x_TH: torch.Tensor
    indices_Tk: torch.Tensor
    weights_Tk: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    activate: Callable[[torch.Tensor], torch.Tensor]
    partial: bool = True

    @property
    def num_experts(self) -> int:
        """N, the number of experts."""
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the hidden size."""
        return self.down.shape[1]

    @property
    def width(self) -> int:
        """W, the width of an expert."""
        return self.down.shape[2]

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return self.x_TH.shape[0]

    @property
    def top_k(self) -> int:
        """k, the number of selected experts per token."""
        return self.indices_Tk.shape[1]

    def all_known(self) -> bool:
        """Return whether every selected expert is one of the N: checked on a CPU, elsewhere taken from ``partial``."""
        if self.indices_Tk.device.type != "cpu":
            return not self.partial
        low, high = self.indices_Tk.aminmax() if self.indices_Tk.numel() else (0, 0)
        return bool(low >= 0 and high < self.num_experts)

    def known_indices_Tk(self) -> torch.Tensor:
        """Return the selected experts, with N for all that are not selected."""
        return self.indices_Tk.clamp(-1, self.num_experts).remainder(self.num_experts + 1)


class ExpertsImplementation(ABC):
    """A stateless implementation of experts, with the results and gradients of transformers' own ``eager``.

    An instance is called as transformers calls an experts function.

    Attributes:
        name: Registered in transformers with ``llamamoe_`` before it.
        summary: One line.
        reference: The paper or source of the idea; empty if it is original or folklore.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""

    @abstractmethod
    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """Return the weighted sum of a token's experts: ``[T, H]``, any floating dtype, differentiable."""

    def __call__(
        self,
        experts: torch.nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the outputs of a native experts module, in the dtype of its inputs.

        Args:
            experts: The module with ``gate_up_proj`` ``[N, 2W, H]`` and ``down_proj`` ``[N, H, W]``.
            hidden_states: ``[T, H]``.
            top_k_index: int64 ``[T, k]``.
            top_k_weights: ``[T, k]``.

        Raises:
            RefusedError: The module's parameters have another meaning.
        """
        _refuse_other_layouts(experts)
        module: Any = experts
        dtype = _compute_dtype(hidden_states)
        call = ExpertsCall(
            hidden_states.to(dtype),
            top_k_index,
            top_k_weights.to(dtype),
            module.gate_up_proj.to(dtype),
            module.down_proj.to(dtype),
            module._apply_gate,
            getattr(module, "_is_expert_parallel", True),
        )
        return self.forward(call).to(hidden_states.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which ``linear`` would compute: autocast does not change float64."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _refuse_other_layouts(experts: torch.nn.Module) -> None:
    plain = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    for key, value in plain.items():
        if getattr(experts, key, value) != value:
            raise RefusedError(
                f"{type(experts).__name__} has {key} = {not value}; llamamoe's experts implementations compute SwiGLU experts with"
                f" {key} = {value} only.",
                hint='Use transformers\' own: model.set_experts_implementation("grouped_mm").',
            )
