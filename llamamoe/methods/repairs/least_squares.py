"""Fit all down projections of a layer together by ridge regression on the dense output."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ...plugins import PluginOptions
from ..layer import ExpertWeights, FfnWeights, LayerContext, TokenWeighting, batch_tokens
from ..moe_layer import ConvertedFfn
from ..solvers.correction import Penalty, corrected
from ..solvers.normal_equations import blocks, normal_equations
from .base import Repair

MOST_PLACES = 32768
"""Maximum number of places that are solved together: the FFN of any dense model, 9 GB for a Gram matrix."""
LEAST_RIDGE = 1e-6
"""Minimum strength, below which the Gram matrix's rounding in float32 dominates."""


def _positive(ridge: float | Literal["auto"]) -> float | Literal["auto"]:
    if ridge != "auto" and not LEAST_RIDGE <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge:g}, but must be finite and {LEAST_RIDGE:g} at least, or auto")
    return ridge


Ridge = Annotated[float | Literal["auto"], AfterValidator(_positive)]
"""A strength, or ``auto``: the best on held-out tokens of each layer."""


class LeastSquares(Repair):
    """``min_D sum_t s_t^2 ||y_t - D h~_t||^2 + sum_j lam_j ||d_j - d0_j||^2`` over down projections D ``[H, P]``.

    ``h~_j = w_i(x) h_j`` for neuron j of expert i (``w_i`` its weight, 0 if it is not selected, 1 if shared), y the
    dense output, D0 the layer's down projections. With G the Gram of h~, ``lam_j`` = ``ridge`` x the mean or the
    median of G's diagonal, or (``balanced``) x the geometric mean of that median and ``G_jj``, over places that hold
    a neuron and were ever active; the others keep D0. The mean is dominated by the few neurons that are hundreds of
    times stronger than all others. The unknown is the correction, ``(G + lam) (D - D0)^T = h~^T (y - h~ D0)``, so that
    a layer without error does not change.

    On its own tokens the error is never larger than without repair: D0 itself is allowed and has no penalty. On other
    text it can be, if there are few tokens and the ridge is weak. ``ridge: auto`` uses for every layer the strength
    that is best on a fifth of the tokens, which are held out for that, and then fits on all of them; if none is
    better than D0, nothing changes.

    A layer of more than `MOST_PLACES` is refitted block after block of experts, each to the error that those before it
    leave: one sweep of block Gauss-Seidel, whose memory does not grow with the square of P.
    """

    name = "least_squares"
    summary = "all down projections of a layer by ridge regression on the dense output"
    reference = "ridge regression towards the parent's weights; original for experts"

    class Options(PluginOptions):
        """Options of `LeastSquares`."""

        ridge: Ridge = Field(
            0.002,
            description="Strength, in units of the penalty, 1e-6 at least; auto: the best on held-out tokens, layer by layer.",
        )
        penalty: Penalty = Field(
            "mean",
            description="Unit of the strength: mean or median power of the neurons; balanced: mixed with each one's own.",
        )
        weighting: TokenWeighting = Field(
            "none", description="residual: errors count relative to the token's residual stream."
        )

    options: Options

    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """See `Repair.repair`. O(T P (H + P)) for the sums of a block, O(P^3) for each solution in float64."""
        options = self.options
        for block in blocks(moe.partition, MOST_PLACES):
            sums = normal_equations(moe, ffn, context, options.weighting, block, hold_out=options.ridge == "auto")
            before_HQ = moe.weights.down_HP[:, block.places]
            after_HQ = corrected(before_HQ, sums, options.ridge, options.penalty)
            if after_HQ is not before_HQ:
                down_HP = moe.weights.down_HP.clone()
                down_HP[:, block.places] = after_HQ
                moe = replace(moe, weights=replace(moe.weights, down_HP=down_HP))
        return moe.weights

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """See `Repair.working_bytes`: four ``[Q, Q]`` and five ``[Q, H]`` in float64 (auto), a batch of activations."""
        solved = min(places, MOST_PLACES)
        batch = 4 * batch_tokens(places) * (4 * places + 2 * hidden_size)
        return (
            8 * solved * (4 * solved + 5 * hidden_size) + batch + (4 * places * hidden_size if places > solved else 0)
        )
