"""Fit a linear regression of the experts' contributions on the FFN's input."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..contributions import Contribution, contributions
from ..layer import FfnWeights, LayerContext, Partition, TokenWeighting
from ..moe_layer import ConvertedFfn
from ..solvers.router_regression import centred, fit_rows, log_contribution
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
