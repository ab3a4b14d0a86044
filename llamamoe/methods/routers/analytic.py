"""CMoE's router: one representative neuron of each expert, approximated by a linear router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ...lazy import np, torch
from ..layer import PADDING, FfnWeights, LayerContext, Partition, activate
from ..markers import MarkerOptions, activation_markers, mean_patterns, pattern_distances
from ..solvers.router_regression import fit_rows
from .base import Router


class Analytic(Router):
    """Scores of CMoE's representative neurons, made linear.

    The representative of expert i is the member whose activation markers (see `Activation`) are nearest, in L1, to
    the mean of the members' markers. CMoE scores an expert with the activation of that neuron alone,
    ``s_i(x) = |act(g^ x) (u^ x)|`` with its gate and up rows at length 1. That is not a linear function, and no
    architecture of transformers runs it: these rows only approximate it.

    * ``product`` (default): the rows R that minimise ``sum_t ||s(x_t) - R x_t||^2 + lam ||R||^2`` on the calibration
      text, ``lam`` = ``ridge`` x the mean square of x, no intercept.
    * ``gate``: ``g^``; ``up``: ``u^``.

    ``product`` is the default because it follows CMoE best: on held-out text of three layers of SmolLM2-135M (25 %
    shared, 8 of 24 experts) it finds 51 to 57 % of the experts that CMoE's score chooses, ``up`` 46 to 47 %, ``gate``
    23 to 39 %; chance is 33 %. The score is nearly even in both of its scalar products, which no linear form can
    follow.

    CMoE's score itself finds 35 to 36 % of an oracle's experts there. One reason: rates are low, so that nearly every
    mean marker is below 1/2, and the member nearest to it is then the one that is marked least.
    """

    name = "analytic"
    summary = "CMoE's representative neurons; its score |act(g x)(u x)| is folded to a linear one (no target runs it)"
    reference = "CMoE (arXiv:2502.04416), analytical router"
    needs = "activations"

    class Options(MarkerOptions):
        """Options of `Analytic`."""

        form: Literal["product", "gate", "up"] = Field(
            "product", description="product: linear least-squares fit of CMoE's score; gate, up: the neuron's own row."
        )
        ridge: float = Field(
            1e-3, ge=1e-9, allow_inf_nan=False, description="Strength of the fit, as a share of the inputs' power."
        )

    options: Options

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`; zeros for an expert without neurons. O(T F H)."""
        chosen = torch.from_numpy(self.representatives(ffn, partition, context))
        if self.options.form == "product":
            return fit_rows(context, cmoe_scores(ffn, chosen, context), self.options.ridge, "none")
        return _unit_rows(ffn.gate_FH if self.options.form == "gate" else ffn.up_FH, chosen)

    def representatives(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> np.ndarray:
        """Return int64 ``[N]``: each expert's representative neuron, the first of equal ones; -1 if empty."""
        markers = activation_markers(ffn, context, self.options)
        members = [expert[expert != PADDING] for expert in partition.experts]
        distances = pattern_distances(markers, mean_patterns(markers, members), "l1")
        nearest = [m[distances[m, i].argmin()] if len(m) else PADDING for i, m in enumerate(members)]
        return np.array(nearest, np.int64)


def cmoe_scores(ffn: FfnWeights, chosen_N: torch.Tensor, context: LayerContext) -> Iterator[torch.Tensor]:
    """Yield CMoE's own scores ``|act(g^ x) (u^ x)|`` of the neurons ``chosen_N``, in batches float32 ``[B, N]``.

    Inputs are not normalised, rows have length 1; 0 for the neuron -1.
    """
    inputs = context.inputs
    gate, up = (_unit_rows(w, chosen_N).to(inputs.device, inputs.compute_dtype) for w in (ffn.gate_FH, ffn.up_FH))
    for x_BH in inputs.inputs():
        yield (activate(x_BH @ gate.T, ffn.hidden_act) * (x_BH @ up.T).float()).abs()


def _unit_rows(weight_FH: torch.Tensor, chosen_N: torch.Tensor) -> torch.Tensor:
    """Return float32 ``[N, H]``: the chosen rows at length 1; zeros for the row -1."""
    return (
        torch.nn.functional.normalize(weight_FH[chosen_N.clamp(min=0)].float(), dim=1) * (chosen_N != PADDING)[:, None]
    )
