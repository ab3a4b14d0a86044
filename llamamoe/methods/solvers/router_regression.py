"""Regression of router rows on a layer's inputs, and the targets of experts' contributions."""

from __future__ import annotations

from collections.abc import Iterator

from ...lazy import torch
from ...numerics import check_finite, double_device, solve_ridge
from ..layer import LayerContext, TokenWeighting, token_scales


def log_contribution(score_BN: torch.Tensor, floor: float) -> torch.Tensor:
    """Return ``log(c_i / mean_j c_j + floor)``; equal values for a token to which no expert contributes."""
    mean_B1 = score_BN.mean(1, keepdim=True)
    return (score_BN / mean_B1.clamp(min=1e-30) + floor).log()


def centred(score_BN: torch.Tensor) -> torch.Tensor:
    """Subtract each token's mean over the experts."""
    return score_BN - score_BN.mean(1, keepdim=True)


def fit_rows(
    context: LayerContext, aims: Iterator[torch.Tensor], ridge: float, weighting: TokenWeighting
) -> torch.Tensor:
    """Return rows R, float32 ``[N, H]`` on the CPU, for which ``R x`` is nearest to the targets.

    Solved by normal equations, summed over batches in float64.

    Args:
        context: The context with the calibration inputs.
        aims: Targets ``[B, N]`` for every batch of the inputs.
        ridge: Strength, as a share of the mean diagonal of ``sum_t x x^T``.
        weighting: Weighting of the tokens.

    Raises:
        LlamaMoeError: An input or target is NaN or infinite.
    """
    inputs, num_experts = context.inputs, context.num_experts
    device = double_device(inputs.device)
    hidden = inputs.x_TH.shape[1]
    gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
    cross = torch.zeros(hidden, num_experts, dtype=torch.float64, device=device)
    scales = token_scales(inputs, weighting)
    for part, x_BH, aim_BN in zip(inputs.batches(), inputs.inputs(), aims, strict=True):
        x_BH, aim_BN = x_BH.float(), aim_BN.float()
        if scales is not None:
            scale_B1 = scales[part].to(x_BH.device)[:, None]
            x_BH, aim_BN = x_BH * scale_B1, aim_BN * scale_B1
        gram += (x_BH.T @ x_BH).to(device)
        cross += (x_BH.T @ aim_BN).to(device)
    check_finite(context.layer, gram, cross)
    strength = ridge * float(gram.diagonal().mean())
    if strength == 0:
        return torch.zeros(num_experts, hidden)
    return solve_ridge(gram, cross, strength).T.float().cpu()
