"""All down projections of a layer together, by ridge regression on the dense output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from ..calibration.inputs import BATCH_TOKENS
from ..plugin import Options
from ..regression import TokenWeighting, solve_ridge
from .base import Repair
from .normal_equations import normal_equations

if TYPE_CHECKING:
    from ..converted_ffn import ConvertedFfn
    from ..layer import ExpertWeights, FfnWeights, LayerContext


class LeastSquares(Repair):
    """``min_D sum_t s_t^2 ||y_t - D h~_t||^2 + lam ||D - D0||^2`` over the down projections D ``[H, P]``.

    ``h~_j = w_i(x) h_j`` for neuron j of expert i (``w_i`` its weight, 0 if it is not selected, 1 if shared), y the
    dense output, D0 the layer's down projections, ``lam`` = ``ridge`` x the mean of the Gram's diagonal over places
    that hold a neuron and were ever active; the others keep D0. What is solved for is the correction,
    ``(G + lam) (D - D0)^T = h~^T (y - h~ D0)``, so that a layer without error stays as it is.

    On its own tokens the error is never larger than without repair: D0 itself is allowed and has no penalty.
    """

    name = "least_squares"
    summary = "all down projections of a layer by ridge regression on the dense output"
    reference = "ridge regression towards the parent's weights; ours for experts"

    class Options(Options):
        """Options of `LeastSquares`."""

        ridge: float = Field(
            0.002, ge=1e-6, allow_inf_nan=False, description="Strength, as a share of the mean diagonal of the Gram."
        )
        weighting: TokenWeighting = Field(
            "none", description="residual: errors count relative to the token's residual stream."
        )

    options: Options

    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """See `Repair.repair`. O(T P (H + P)) for the sums, O(P^3) for the solution in float64."""
        sums = normal_equations(moe, ffn, context, self.options.weighting)
        kept = sums.places
        if not len(kept):
            return moe.weights
        # One copy of the Gram at most: it is the largest thing in memory.
        every = len(kept) == len(sums.gram_PP)
        gram = sums.gram_PP if every else sums.gram_PP[kept][:, kept]
        strength = self.options.ridge * float(gram.diagonal().mean())
        correction_QH = solve_ridge(gram, sums.cross_PH[kept], strength)
        down_HP = moe.weights.down_HP.clone()
        down_HP[:, kept.cpu()] += correction_QH.T.to(down_HP.device, down_HP.dtype)
        return replace(moe.weights, down_HP=down_HP)

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """See `Repair.working_bytes`: Gram and its factor, three ``[P, H]`` in float64, one batch of activations."""
        return 8 * places * (2 * places + 3 * hidden_size) + 4 * BATCH_TOKENS * (4 * places + 2 * hidden_size)
