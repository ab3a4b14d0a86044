"""All experts as one dense FFN, each token's neurons multiplied by its experts' weights, most of which may be 0."""

from __future__ import annotations

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation


class Masked(ExpertsImplementation):
    """Two matrix products over all N W neurons; the work of the dense parent, whatever k is.

    For one token the experts that it selected are taken out first, so that decoding reads little more than those: with
    narrow experts a copy of their weights costs less than a call per expert.
    """

    name = "masked"
    summary = "all experts as one dense FFN, weights 0 for those not selected: small batches, or nearly all selected"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`. O(T N W H), for one token O(k W H)."""
        if call.num_tokens == 1 and call.top_k < call.num_experts:
            indices_k = call.known_indices_Tk()[0]
            selected_k = indices_k < call.num_experts
            at_k = indices_k.where(selected_k, 0)
            weights_1k = call.weights_Tk * selected_k
            return _dense(call, call.gate_up.index_select(0, at_k), call.down.index_select(0, at_k), weights_1k)
        weights = call.weights_Tk.new_zeros(call.num_tokens, call.num_experts + 1)
        weights = weights.scatter_add(1, call.known_indices_Tk(), call.weights_Tk)
        return _dense(call, call.gate_up, call.down, weights[:, : call.num_experts])


def _dense(call: ExpertsCall, gate_up: torch.Tensor, down: torch.Tensor, weights_TN: torch.Tensor) -> torch.Tensor:
    """``[T, H]`` of these experts, all of them on every token. Reads the weights, copies ``down``."""
    T, (N, H, W) = call.num_tokens, down.shape
    if _regroup(T, H, W):
        gate_up_PH = gate_up.view(N, 2, W, H).transpose(0, 1).reshape(2 * N * W, H)
        hidden_TNW = call.activate(torch.nn.functional.linear(call.x_TH, gate_up_PH)).view(T, N, W)
    else:
        hidden_TNW = call.activate(
            torch.nn.functional.linear(call.x_TH, gate_up.reshape(2 * N * W, H)).view(T, N, 2 * W)
        )
    weighted_TP = (hidden_TNW * weights_TN[:, :, None]).view(T, N * W)
    return torch.nn.functional.linear(weighted_TP, down.transpose(0, 1).reshape(H, N * W))


def _regroup(tokens: int, hidden_size: int, width: int) -> bool:
    """Whether to copy the weights so that all gate rows come before all up rows.

    As they are stored, ``act(gate) * up`` works on T N pieces of W numbers, which costs some 60 ns a piece; the copy
    moves 2 N W H numbers once.
    """
    return tokens * 256 > width * hidden_size
