"""Fit all down projections of a layer together by ridge regression on the dense output."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ...lazy import torch
from ...numerics import solve_ridge
from ...plugins import PluginOptions
from ..layer import BATCH_TOKENS, ExpertWeights, FfnWeights, LayerContext, TokenWeighting
from ..moe_layer import ConvertedFfn
from ..solvers.normal_equations import NormalEquations, normal_equations
from .base import Repair

Penalty = Literal["mean", "median", "balanced"]

LEAST_RIDGE = 1e-6
"""Minimum strength, below which the Gram matrix's rounding in float32 dominates."""


def _positive(ridge: float | Literal["auto"]) -> float | Literal["auto"]:
    if ridge != "auto" and not LEAST_RIDGE <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge:g}, but must be finite and {LEAST_RIDGE:g} at least, or auto")
    return ridge


Ridge = Annotated[float | Literal["auto"], AfterValidator(_positive)]
"""A strength, or ``auto``: the best on held-out tokens of each layer."""

AUTO_START, AUTO_STEP, AUTO_LEAST, AUTO_MOST = 0.3, 10**0.5, 1e-4, 1e3
"""Start, step and ends of the search for the strength."""


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
        """See `Repair.repair`. O(T P (H + P)) for the sums, O(P^3) for each solution in float64."""
        options = self.options
        sums = normal_equations(moe, ffn, context, options.weighting, hold_out=options.ridge == "auto")
        down_HP = corrected(moe.weights.down_HP, sums, options.ridge, options.penalty)
        return moe.weights if down_HP is moe.weights.down_HP else replace(moe.weights, down_HP=down_HP)

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """See `Repair.working_bytes`: four ``[P, P]`` and five ``[P, H]`` in float64 (auto), a batch of activations."""
        return 8 * places * (4 * places + 5 * hidden_size) + 4 * BATCH_TOKENS * (4 * places + 2 * hidden_size)


def corrected(
    down_HP: torch.Tensor, equations: list[NormalEquations], ridge: float | Literal["auto"], penalty: Penalty
) -> torch.Tensor:
    """Return the refitted projection ``[H, P]``, or the same one if it is best; the sums are changed in place.

    Args:
        down_HP: The projection that the sums are relative to.
        equations: Sums over the tokens to fit on, and for ``auto`` over those held out.
        ridge: Strength, see `LeastSquares.Options`.
        penalty: Its unit.
    """
    sums, *others = equations
    strength = best_strength(sums, others[0], penalty) if ridge == "auto" else float(ridge)
    if strength is None:
        return down_HP
    for held_out in others:
        # The strength acts like a number of tokens: with more tokens, less is needed.
        before = float(sums.gram_PP.trace())
        sums.gram_PP.add_(held_out.gram_PP)
        sums.cross_PH.add_(held_out.cross_PH)
        strength *= before / float(sums.gram_PP.trace())
    kept = sums.places
    if not len(kept):
        return down_HP
    gram_QQ = sums.gram(kept)
    correction_QH = solve_ridge(gram_QQ, sums.cross_PH[kept], strength * penalties(gram_QQ, penalty))
    found = down_HP.clone()
    found[:, kept.cpu()] += correction_QH.T.to(found.device, found.dtype)
    return found


def penalties(gram_QQ: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """Return the factor of the strength for every place, float64 ``[Q]``."""
    power_Q = gram_QQ.diagonal().clone()
    if penalty == "mean":
        return power_Q.mean().expand_as(power_Q)
    median = power_Q.median()
    return median.expand_as(power_Q) if penalty == "median" else (power_Q * median).sqrt()


def best_strength(fit: NormalEquations, held_out: NormalEquations, penalty: Penalty) -> float | None:
    """Return the strength whose correction lowers the held-out error most; None if none lowers it.

    Hill climbing from `AUTO_START` in steps of a factor sqrt(10), as the error has nearly always one minimum: about
    five solutions.
    """
    places = fit.places
    if not len(places):
        return None
    gram_QQ, cross_QH = fit.gram(places), fit.cross_PH[places]
    base_Q = penalties(gram_QQ, penalty)
    other_QQ, other_QH = held_out.gram(places), held_out.cross_PH[places]
    changes: dict[int, float] = {}

    def change(step: int) -> float:
        """Return the change of the sum of squared errors by the correction."""
        if step not in changes:
            strength = AUTO_START * AUTO_STEP**step
            if not AUTO_LEAST <= strength <= AUTO_MOST:
                return float("inf")
            c_QH = solve_ridge(gram_QQ.clone(), cross_QH, strength * base_Q)
            changes[step] = float(((other_QQ @ c_QH - 2 * other_QH) * c_QH).sum())
        return changes[step]

    best = 0
    way = 1 if change(1) < change(0) else -1
    while change(best + way) < change(best):
        best += way
    return AUTO_START * AUTO_STEP**best if change(best) < 0 else None
