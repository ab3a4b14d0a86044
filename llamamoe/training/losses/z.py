"""Small logits: the router z-loss of ST-MoE."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...lazy import torch
from ..routing import Routing, at_least_float32
from .base import LossContext, RoutingLoss


class Z(RoutingLoss):
    """``sum_t logsumexp(logits_t)^2``, mean over layers; the caller's division by tokens makes it ST-MoE's mean.

    It keeps logits small, where rounding is fine-grained. Its minimum is at logsumexp 0: equal logits are drawn to
    ``-log N``, not to 0. For sigmoid routers, which have no softmax, it is the same function of the logits.
    """

    name = "z"
    summary = "squared logsumexp of the logits, which keeps them small"
    reference = "arXiv:2202.08906"
    linear: ClassVar[bool] = True

    class Options(RoutingLoss.Options):
        """Options of `Z`."""

        coefficient: float = Field(0.001, ge=0, allow_inf_nan=False, description="What the loss is multiplied by.")

    options: Options

    def layer_loss(self, routing: Routing, context: LossContext) -> torch.Tensor:
        """See `RoutingLoss.layer_loss`. O(T N)."""
        return at_least_float32(routing.logits_TN).logsumexp(-1).square().sum()
