"""Choose the experts of each token that together bring the layer's output nearest to the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...lazy import torch
from ..layer import FfnWeights, LayerInputs
from ..moe_layer import ConvertedFfn, dense_outputs

FLOATS_AT_ONCE = 2**24
"""Maximum number of values of all experts' outputs and scalar products in memory (64 MB)."""


@dataclass(frozen=True)
class Choices:
    """The best choices for every token, on the CPU.

    Attributes:
        chosen_TN: bool ``[T, N]``, k experts per token.
        gain_T: float32 ``[T]``, by how much they lower the token's squared error, in comparison with none.
        norm_TN: float32 ``[T, N]``, ``||E_i(x)||^2`` of every expert.
    """

    chosen_TN: torch.Tensor
    gain_T: torch.Tensor
    norm_TN: torch.Tensor


def best_choices(moe: ConvertedFfn, ffn: FfnWeights, inputs: LayerInputs) -> Choices:
    """Return greedy choices of k experts for all tokens, from the experts' outputs.

    In addition to one sweep of the dense FFN and of all experts, O(T N^2 H) for the experts' scalar products and O(T N
    k) for the choices; ``T N`` x 5 bytes are kept.

    Args:
        moe: The layer; its router is ignored.
        ffn: The dense FFN, whose output is the target.
        inputs: The tokens.
    """
    found = []
    for gram_BNN, cross_BN in scalar_products(moe, ffn, inputs):
        chosen_BN, gain_B = greedy_choices(gram_BNN, cross_BN, moe.coefficient, moe.top_k)
        found.append((chosen_BN, gain_B, gram_BNN.diagonal(dim1=1, dim2=2).clamp(min=0)))
    if not found:
        empty = torch.empty(0, moe.num_experts)
        return Choices(empty.bool(), torch.empty(0), empty)
    return Choices(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True)))


def scalar_products(
    moe: ConvertedFfn, ffn: FfnWeights, inputs: LayerInputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``<E_i, E_e>`` float32 ``[B, N, N]`` and ``<r, E_i>`` ``[B, N]`` for a few tokens at a time, in order.

    ``E_i`` are the experts' outputs without the router's weight, r is the dense output minus the shared neurons'.
    """
    shared, (num_experts, width) = len(moe.partition.shared), moe.partition.experts.shape
    down_HP = moe.weights.down_HP.to(inputs.device)
    down_NWH = down_HP[:, shared:].T.reshape(num_experts, width, -1)
    at_once = max(1, FLOATS_AT_ONCE // (num_experts * (num_experts + len(down_HP))))
    hidden = inputs.hidden(moe.weights, moe.hidden_act)
    for y_BH, h_BP in zip(dense_outputs(inputs, ffn), hidden, strict=True):
        rest_BH = y_BH - h_BP[:, :shared] @ down_HP[:, :shared].T
        for start in range(0, len(h_BP), at_once):
            part = slice(start, start + at_once)
            h_NBW = h_BP[part, shared:].reshape(-1, num_experts, width).transpose(0, 1)
            out_BNH = (h_NBW @ down_NWH).transpose(0, 1)
            yield out_BNH @ out_BNH.transpose(1, 2), (out_BNH @ rest_BH[part, :, None])[:, :, 0]


def greedy_choices(
    gram_BNN: torch.Tensor, cross_BN: torch.Tensor, coefficient: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run greedy forward selection, as in orthogonal matching pursuit with given coefficients.

    k times the expert with the largest ``||r||^2 - ||r - c E_i||^2 = 2 c <r, E_i> - c^2 ||E_i||^2`` is taken, even
    if that is negative, and ``c E_i`` subtracted from r. It is optimal if the experts' outputs are
    orthogonal.

    Args:
        gram_BNN: ``<E_i, E_e>``.
        cross_BN: ``<r, E_i>``.
        coefficient: c, the factor of a selected expert's output.
        top_k: k, at most N.

    Returns:
        bool ``[B, N]``, and the total gain ``[B]``.
    """
    gain_BN = 2 * coefficient * cross_BN - coefficient**2 * gram_BNN.diagonal(dim1=1, dim2=2)
    chosen_BN = torch.zeros_like(cross_BN, dtype=torch.bool)
    total_B = torch.zeros_like(cross_BN[:, 0])
    for _ in range(top_k):
        best = gain_BN.masked_fill(chosen_BN, -torch.inf).max(1, keepdim=True)
        chosen_BN.scatter_(1, best.indices, True)
        total_B = total_B + best.values[:, 0]
        taken_BN = gram_BNN.gather(1, best.indices[:, :, None].expand(-1, 1, gram_BNN.shape[2]))[:, 0]
        gain_BN = gain_BN - 2 * coefficient**2 * taken_BN
    return chosen_BN, total_B
