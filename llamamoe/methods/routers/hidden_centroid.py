"""Use the mean input of the tokens on which an expert matters."""

from __future__ import annotations

from ...lazy import torch
from ...numerics import check_finite
from ..contributions import contributions
from ..layer import FfnWeights, LayerContext, Partition
from .base import Router


class HiddenCentroid(Router):
    """Rows that belong to the partition; otherwise the mean direction of the tokens on which an expert matters.

    Splitters that cluster tokens provide their centroids, which become the rows. For any other partition expert i is
    among the k largest contributors on the tokens ``T_i`` (contribution = sum of the powers ``h_j^2 ||down_j||^2`` of
    its neurons), and its row is the direction of

        mean over T_i of x/||x||  -  mean over all tokens of x/||x||.

    The difference is taken because all inputs share a large common direction, which does not distinguish experts. An
    expert that is never among the largest contributors, or always, gets a row of zeros.
    """

    name = "hidden_centroid"
    summary = "mean input direction of the tokens on which the expert contributes most, or the splitter's centroids"
    reference = "after LLaMA-MoE-v2 (arXiv:2411.15708), whose experts have a cluster of inputs each"
    needs = "activations"

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`. O(T F H), or nothing if the rows came with the partition."""
        if partition.router_NH is not None:
            return partition.router_NH.float()
        inputs = context.inputs
        sums_NH = torch.zeros(context.num_experts, inputs.x_TH.shape[1], dtype=torch.float64)
        total_H, count_N = torch.zeros_like(sums_NH[0]), torch.zeros_like(sums_NH[:, :1])
        scores = contributions(ffn, partition, inputs, kind="power")
        for x_BH, score_BN in zip(inputs.inputs(), scores, strict=True):
            unit_BH = torch.nn.functional.normalize(x_BH.float(), dim=1)
            top = score_BN.topk(context.top_k, dim=1).indices
            among_BN = torch.zeros_like(score_BN).scatter_(1, top, 1.0)
            sums_NH += (among_BN.T @ unit_BH).double().cpu()
            total_H += unit_BH.sum(0).double().cpu()
            count_N += among_BN.sum(0)[:, None].double().cpu()
        check_finite(context.layer, sums_NH)
        own_NH = sums_NH / count_N.clamp(min=1) - total_H / max(inputs.num_tokens, 1)
        # Always or never chosen: the difference is only rounding, or the mean itself.
        some_N1 = (count_N > 0) & (count_N < inputs.num_tokens)
        return torch.nn.functional.normalize(own_NH * some_N1, dim=1).float()
