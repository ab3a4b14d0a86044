"""Select and weight experts from given logits as native routers do, for gates with noise or capacity."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from ...architectures.moe_layout import router_scores
from ...lazy import torch
from ..moe_layers import MoeLayer

CapacityFactor = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="Room per expert, relative to a perfectly balanced load.")
]


def scores_TN(moe: MoeLayer, logits_TN: torch.Tensor) -> torch.Tensor:
    """Return float32: softmax of the logits, or the sigmoid of each."""
    return router_scores(logits_TN.float(), moe.weighting)


def ranked_TN(moe: MoeLayer, logits_TN: torch.Tensor) -> torch.Tensor:
    """Return float32: the numbers whose largest k are selected; -inf for excluded groups of experts. No gradient.

    If nothing is added to the scores these are the logits themselves, which tie less often than their scores.
    """
    with torch.no_grad():
        bias, groups = moe.correction_bias, int(getattr(moe.router, "num_group", 1))
        if bias is None:
            return logits_TN.float()
        scores = scores_TN(moe, logits_TN) + bias.view(-1)
        if groups > 1:
            scores = scores.masked_fill(_shut_out(moe.router, scores, groups), float("-inf"))
        return scores


def _shut_out(router: Any, scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the experts of groups whose two best scores sum to too little: bool ``[T, N]``."""
    grouped_TGE = scores.view(len(scores), groups, -1)
    sums_TG = grouped_TGE.topk(2, dim=-1)[0].sum(-1)
    best = sums_TG.topk(router.topk_group, dim=-1, sorted=False)[1]
    shut_TG = torch.ones_like(sums_TG, dtype=torch.bool).scatter_(1, best, False)
    return shut_TG.unsqueeze(-1).expand_as(grouped_TGE).reshape(scores.shape)


def weights_Tk(moe: MoeLayer, logits_TN: torch.Tensor, indices_Tk: torch.Tensor) -> torch.Tensor:
    """Return float32: the router's factors of the given experts' outputs, as if it had selected them itself."""
    router: Any = moe.router
    found = scores_TN(moe, logits_TN).gather(-1, indices_Tk)
    if moe.weighting.endswith("renormalised"):
        total = found.sum(-1, keepdim=True)
        least = getattr(router, "norm_min", None)
        if least is not None:
            total = total.clamp(min=least)
        elif moe.weighting.startswith("sigmoid"):
            total = total + 1e-20
        found = found / total
    return found * moe.factor


def capacity(factor: float, tokens: int, moe: MoeLayer) -> int:
    """Return the number of assignments that one expert has room for: ``ceil(factor T k / N)``, at least 1."""
    # Rounded first: 1.1 x 100 / 11 is a little more than 10 in binary.
    return max(1, math.ceil(round(factor * tokens * moe.top_k / moe.num_experts, 9)))


def positions(experts_M: torch.Tensor, order_M: torch.Tensor | None = None) -> torch.Tensor:
    """Return int64 ``[M]``: how many assignments to the same expert come before each; O(M log M).

    Args:
        experts_M: The expert of each assignment.
        order_M: The assignments in the order in which they are served; None: the given order.
    """
    given = experts_M if order_M is None else experts_M[order_M]
    sorted_M, by_expert = given.sort(stable=True)
    first_M = torch.searchsorted(sorted_M, sorted_M)  # where each expert's run begins
    rank_M = torch.arange(len(given), device=given.device) - first_M
    served = by_expert if order_M is None else order_M[by_expert]
    return torch.empty_like(rank_M).scatter_(0, served, rank_M)
