"""Fit a linear regression of the experts' contributions on the FFN's input."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ...lazy import torch
from ...numerics import check_finite, double_device, solve_ridge
from ...plugins import PluginOptions
from ..contributions import Contribution, contributions
from ..layer import FfnWeights, LayerContext, Partition, TokenWeighting, token_scales
from ..moe_layer import ConvertedFfn
from .base import Router


class Ridge(Router):
    """``min_R sum_t s_t^2 ||z_t - R x_t||^2 + lam ||R||^2`` for the rows R ``[N, H]``.

    ``z_i`` = ``log(c_i / mean_j c_j + floor)`` with ``c_i`` the contribution of expert i to the token (see
    `llamamoe.methods.contributions.contributions`), or ``c_i`` itself; minus its mean over the experts, which changes
    no ranking. ``lam`` = ``ridge`` x the mean square of x. There is no intercept because a softmax router has none: the
    mean of x, which is large behind an RMSNorm, serves as one. Original to this project.
    """

    name = "ridge"
    summary = "ridge regression of the experts' (log) contributions on the input"
    needs = "activations"

    class Options(PluginOptions):
        """Options of `Ridge`."""

        ridge: float = Field(
            1e-3, ge=1e-9, allow_inf_nan=False, description="Strength, as a share of the mean square of the inputs."
        )
        contribution: Contribution = Field(
            "norm", description="norm: ||E_i(x)||^2; power: the sum of its neurons' powers."
        )
        log: bool = Field(True, description="Whether the logarithm of the contribution is regressed.")
        floor: float = Field(
            1e-2, gt=0, allow_inf_nan=False, description="Added under the logarithm, as a share of the token's mean."
        )
        weighting: TokenWeighting = Field(
            "none", description="residual: errors count relative to the token's residual stream."
        )

    options: Options

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`. O(T (F H + H^2) + H^3)."""
        scores = contributions(ffn, partition, context.inputs, kind=self.options.contribution)
        return self._fit(scores, context)

    def refit(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> torch.Tensor:
        """See `Router.refit`: from the contributions of the repaired experts."""
        scores = contributions(
            moe.weights, moe.partition, context.inputs, kind=self.options.contribution, hidden_act=moe.hidden_act
        )
        return self._fit(scores, context)

    def _fit(self, scores: Iterator[torch.Tensor], context: LayerContext) -> torch.Tensor:
        options = self.options
        aims = (centred(log_contribution(c, options.floor) if options.log else c) for c in scores)
        return fit_rows(context, aims, options.ridge, options.weighting)


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
