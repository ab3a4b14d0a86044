"""Repair a layer by few numbers: one factor for its routed experts, or one for each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...lazy import torch
from ...numerics import check_finite, double_device, solve_ridge
from ...plugins import PluginOptions
from ..layer import BATCH_TOKENS, ExpertWeights, FfnWeights, LayerContext, TokenWeighting, token_scales
from ..moe_layer import ConvertedFfn
from ..solvers.normal_equations import residuals
from .base import Repair

OUTPUT_FLOATS = 2**25
"""Maximum number of values of the groups' outputs in memory."""


class Factors(Repair, ABC):
    """``min_a sum_t s_t^2 ||y_t - sum_g a_g O_g(x_t)||^2 + lam ||a - 1||^2`` for the outputs O_g of groups of places.

    Each group's down projections are multiplied by its factor. Solved for ``a - 1`` from the error without
    repair: ``(G + lam) (a - 1) = sum_t <O_g, y - sum O>`` with ``G_gh = sum_t <O_g, O_h>``, and ``lam`` = ``ridge`` x
    the mean of G's diagonal. A group that is never active keeps its weights.
    """

    class Options(PluginOptions):
        """Options of `Factors`."""

        ridge: float = Field(
            1e-4, ge=1e-9, allow_inf_nan=False, description="Pull of the factors towards 1, as a share of the outputs."
        )
        weighting: TokenWeighting = Field(
            "none", description="residual: errors count relative to the token's residual stream."
        )

    options: Options

    @abstractmethod
    def groups(self, shared: int, num_experts: int, width: int) -> list[slice]:
        """Return the places of each group."""

    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """See `Repair.repair`. O(T (P H + G^2 H)) for G groups."""
        groups = self.groups(len(moe.partition.shared), *moe.partition.experts.shape)
        gram_GG, cross_G = self._sums(moe, ffn, context, groups)
        active = (gram_GG.diagonal() > 0).nonzero().flatten()
        down_HP = moe.weights.down_HP.clone()
        if len(active):
            gram = gram_GG[active][:, active]
            strength = self.options.ridge * float(gram.diagonal().mean())
            changes = solve_ridge(gram, cross_G[active][:, None], strength)
            for g, change in zip(active.tolist(), changes.flatten().tolist(), strict=True):
                down_HP[:, groups[g]] *= 1 + change
        return replace(moe.weights, down_HP=down_HP)

    def _sums(
        self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext, groups: list[slice]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float64 ``[G, G]`` and ``[G]``: products of the groups' outputs with each other and the error."""
        inputs, hidden_size = context.inputs, ffn.down_HF.shape[0]
        device = double_device(inputs.device)
        gram = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=device)
        cross = torch.zeros(len(groups), dtype=torch.float64, device=device)
        scales = token_scales(inputs, self.options.weighting)
        down_PH = moe.weights.down_HP.T.to(inputs.device)
        at_once = max(1, OUTPUT_FLOATS // (len(groups) * hidden_size + 1))
        for part, batch in zip(inputs.batches(), residuals(moe, ffn, inputs), strict=True):
            hidden_BP, error_BH = batch[:2]
            if scales is not None:
                scale_B1 = scales[part].to(inputs.device)[:, None]
                hidden_BP, error_BH = hidden_BP * scale_B1, error_BH * scale_B1
            for start in range(0, len(error_BH), at_once):
                h_CP, e_CH = hidden_BP[start : start + at_once], error_BH[start : start + at_once]
                outputs_GX = torch.stack([(h_CP[:, g] @ down_PH[g]).flatten() for g in groups])
                gram += (outputs_GX @ outputs_GX.T).to(device)
                cross += (outputs_GX @ e_CH.flatten()).to(device)
        check_finite(context.layer, gram, cross)
        return gram, cross

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """See `Repair.working_bytes`: two copies of the down projections, the groups' outputs, one batch."""
        batch = BATCH_TOKENS * (4 * places + 2 * hidden_size)
        return 4 * (2 * places * hidden_size + OUTPUT_FLOATS + batch)


class Scalar(Factors):
    """One factor for all routed experts of a layer: ``<y - shared, routed> / <routed, routed>`` over all tokens.

    With ``part: all`` the shared neurons have the same factor: ``<y, output> / <output, output>``. Folklore.
    """

    name = "scalar"
    summary = "one factor per layer for the routed experts, by least squares"

    class Options(Factors.Options):
        """Options of `Scalar`."""

        part: Literal["routed", "all"] = Field("routed", description="The neurons that get the factor.")

    options: Options

    def groups(self, shared: int, num_experts: int, width: int) -> list[slice]:
        """See `Factors.groups`."""
        return [slice(0 if self.options.part == "all" else shared, shared + num_experts * width)]


class PerExpert(Factors):
    """One factor for every expert and one for the shared neurons. Original to this project."""

    name = "per_expert"
    summary = "one factor per expert and one for the shared neurons, by least squares"

    def groups(self, shared: int, num_experts: int, width: int) -> list[slice]:
        """See `Factors.groups`."""
        starts = [0, *range(shared, shared + num_experts * width, max(width, 1))]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], shared + num_experts * width], strict=True)]
