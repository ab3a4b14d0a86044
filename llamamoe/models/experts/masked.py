"""Compute all experts as one dense FFN, with neurons multiplied by the experts' weights, most of which may be 0."""

from __future__ import annotations

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation

FEW, SOME = 8, 48
"""Up to so many tokens, adding up the outputs of all experts takes less time than a copy of their down projections, and up
to SOME the weights are the left factor of a product, which oneDNN and MKL do not pack. On a Xeon, 16 tokens of 24 of 64
experts, hidden 2048, bfloat16, took 0.75 of the time of the other two ways, and 64 tokens more than both."""


class Masked(ExpertsImplementation):
    """Two matrix products over all N W neurons; the work of the dense parent, whatever k is.

    For one token its selected experts are gathered first, so that decoding reads little more than those: with
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
    """Return ``[T, H]`` of these experts, all of them on every token."""
    T, (N, H, W) = call.num_tokens, down.shape
    if T <= FEW:
        hidden_TNW = call.activate(_gate_up(call, gate_up).view(T, N, 2 * W)) * weights_TN[:, :, None]
        return _sum(torch.bmm(hidden_TNW.transpose(0, 1), down.transpose(1, 2)))
    if T <= SOME:
        out_PT = torch.mm(gate_up.reshape(2 * N * W, H), call.x_TH.T).view(N, 2 * W, T)
        hidden_NTW = call.activate(out_PT.transpose(1, 2)) * weights_TN.T[:, :, None]
        return _sum(torch.bmm(down, hidden_NTW.transpose(1, 2))).T
    if _regroup(T, H, W):
        gate_up = gate_up.view(N, 2, W, H).transpose(0, 1)
        hidden_TNW = call.activate(_gate_up(call, gate_up)).view(T, N, W)
    else:
        hidden_TNW = call.activate(_gate_up(call, gate_up).view(T, N, 2 * W))
    weighted_TP = (hidden_TNW * weights_TN[:, :, None]).view(T, N * W)
    return torch.nn.functional.linear(weighted_TP, down.transpose(0, 1).reshape(H, N * W))


def _gate_up(call: ExpertsCall, gate_up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(call.x_TH, gate_up.reshape(-1, call.hidden_size))


def _sum(out_NTH: torch.Tensor) -> torch.Tensor:
    """Sum over experts, in float32 at least."""
    return out_NTH.sum(0, dtype=torch.promote_types(out_NTH.dtype, torch.float32))


def _regroup(tokens: int, hidden_size: int, width: int) -> bool:
    """Return whether to copy the weights so that all gate rows come before all up rows.

    In the stored order, ``act(gate) * up`` works on T N pieces of W numbers, which costs about 60 ns per piece; the
    copy moves 2 N W H numbers once.
    """
    return tokens * 256 > width * hidden_size
