"""Attention whose query heads are experts: routers and output projections fitted on calibration text.

With G key/value heads of N query heads each, expert n is the n-th query head of every key/value head. ``Q`` = G N D is the
width of all heads, in the parent's order: by key/value head, then by expert, then by the D places of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..architectures.moe_layout import RouterWeighting
from ..lazy import torch
from ..numerics import check_finite, double_device
from .contributions import OracleTally
from .layer import LayerContext, LayerInputs
from .moe_layer import routed_weights
from .solvers.correction import corrected
from .solvers.normal_equations import NormalEquations, held_out_tokens
from .solvers.router_regression import centred, fit_rows, log_contribution

RIDGE, FLOOR = 1e-3, 1e-2
"""Strength of the router's regression and floor of the logarithm: the defaults of `llamamoe.methods.routers.ridge`."""


@dataclass(frozen=True)
class RoutedHeads:
    """Router and output projection of one layer's attention.

    Attributes:
        router_NH: float32 rows.
        output_HQ: ``[H, Q]``, in the parent's units.
        groups: ``G``, key/value heads.
        top_k: Experts per token.
        scale: See `llamamoe.methods.moe_layer.ConvertedFfn`, as for the next two.
        weighting: Normalisation of the router.
        factor: Factor of its weights.
    """

    router_NH: torch.Tensor
    output_HQ: torch.Tensor
    groups: int
    top_k: int
    scale: Literal["hard", "soft"]
    weighting: RouterWeighting
    factor: float

    def expert_weights(self, x_BH: torch.Tensor) -> torch.Tensor:
        """Return the weight of every expert for each token, float32 ``[B, N]``, 0 if it is not selected."""
        logits_BN = x_BH.float() @ self.router_NH.to(x_BH.device).T
        return routed_weights(logits_BN, self.top_k, self.scale, self.weighting, self.factor)

    def weighted(self, x_BH: torch.Tensor, heads_BQ: torch.Tensor) -> torch.Tensor:
        """Return the heads times the weights of their experts, ``[B, Q]``."""
        weights_BN = self.expert_weights(x_BH).to(heads_BQ.dtype)
        return (self.by_expert(heads_BQ) * weights_BN[:, None, :, None]).flatten(1)

    def by_expert(self, heads_BQ: torch.Tensor) -> torch.Tensor:
        """Return a view ``[B, G, N, D]``."""
        return heads_BQ.reshape(len(heads_BQ), self.groups, len(self.router_NH), -1)


@dataclass(frozen=True)
class HeadInputs:
    """One layer's attention on the calibration text.

    Attributes:
        inputs: Its inputs, after the norm.
        heads: Computes the dense outputs of all heads again, in the same batches, float32 ``[B, Q]``.
    """

    inputs: LayerInputs
    heads: Callable[[], Iterator[torch.Tensor]]

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs and heads, float32 ``[B, H]`` and ``[B, Q]``."""
        for x_BH, heads_BQ in zip(self.inputs.inputs(), self.heads(), strict=True):
            yield x_BH.float(), heads_BQ.float()


def head_contributions(routed: RoutedHeads, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from heads ``[B, Q]`` to ``||o_n a_n||^2`` of every expert n, float32 ``[B, N]``.

    ``a_n`` are its heads, ``o_n`` the columns of the output projection for them. O(B Q^2 / N).
    """
    output_NHR = routed.by_expert(routed.output_HQ.to(device, torch.float32)).permute(2, 0, 1, 3).flatten(2)
    gram_NRR = output_NHR.transpose(1, 2) @ output_NHR

    def scores(heads_BQ: torch.Tensor) -> torch.Tensor:
        heads_NBR = routed.by_expert(heads_BQ).permute(2, 0, 1, 3).flatten(2)
        return (torch.bmm(heads_NBR, gram_NRR) * heads_NBR).sum(2).clamp_(min=0).T

    return scores


def head_rows(routed: RoutedHeads, text: HeadInputs, context: LayerContext) -> torch.Tensor:
    """Return rows, float32 ``[N, H]``: the ridge regression of the experts' log contributions on the attention's input."""
    scores = head_contributions(routed, text.inputs.device)
    aims = (centred(log_contribution(scores(heads_BQ), FLOOR)) for heads_BQ in text.heads())
    return fit_rows(replace(context, calibration=text.inputs), aims, RIDGE, "none")


def fit_output(routed: RoutedHeads, text: HeadInputs, layer: int) -> RoutedHeads:
    """Return the heads with the output projection refitted to the dense output on the selected experts.

    ``(G + lam) (O - O0)^T = z^T (y - z O0^T)`` with z the weighted heads, y the dense output, O0 the present projection,
    and ``lam`` the strength that is best on held-out tokens; unchanged if none is. O(T Q (Q + H) + Q^3) in float64.
    """
    device = double_device(text.inputs.device)
    hidden, width = routed.output_HQ.shape
    output_HQ = routed.output_HQ.to(text.inputs.device, torch.float32)
    sums = [_no_sums(width, hidden, device) for _ in range(2)]
    fold_T = held_out_tokens(text.inputs.num_tokens).long()
    for part, (x_BH, heads_BQ) in zip(text.inputs.batches(), text.batches(), strict=True):
        z_BQ = routed.weighted(x_BH, heads_BQ)
        missing_BH = (heads_BQ - z_BQ) @ output_HQ.T
        for fold, into in enumerate(sums):
            rows = (fold_T[part] == fold).nonzero().flatten().to(z_BQ.device)
            left_QB = z_BQ[rows].T
            into.gram_PP.add_((left_QB @ z_BQ[rows]).to(device))
            into.cross_PH.add_((left_QB @ missing_BH[rows]).to(device))
    for into in sums:
        check_finite(layer, into.gram_PP.diagonal(), into.cross_PH)
    return replace(routed, output_HQ=corrected(routed.output_HQ.float(), sums, "auto", "mean"))


def _no_sums(width: int, hidden: int, device: torch.device) -> NormalEquations:
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, hidden, dtype=torch.float64, device=device)
    return NormalEquations(gram, cross, torch.arange(width, device=device))


def head_facts(routed: RoutedHeads, dense_HQ: torch.Tensor, text: HeadInputs) -> dict[str, Any]:
    """Return ``||y - y~|| / ||y||`` over all tokens, and the router's quality (see `router_quality`)."""
    tally = OracleTally(len(routed.router_NH), routed.top_k)
    device = text.inputs.device
    ours, theirs = routed.output_HQ.to(device, torch.float32), dense_HQ.to(device, torch.float32)
    missed = whole = 0.0
    scores = head_contributions(replace(routed, output_HQ=dense_HQ), device)
    for x_BH, heads_BQ in text.batches():
        y_BH = heads_BQ @ theirs.T
        missed += float((y_BH - routed.weighted(x_BH, heads_BQ) @ ours.T).double().square().sum())
        whole += float(y_BH.double().square().sum())
        tally.add(scores(heads_BQ), routed.expert_weights(x_BH) != 0)
    error = math.sqrt(missed / whole) if whole else math.sqrt(missed)
    return {"attention_error": error, "attention_router_quality": tally.quality()}
