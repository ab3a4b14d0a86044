"""Switch Transformers: one expert per token, with a capacity."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..moe_layers import MoeLayer
from .base import Gate, Gated, Native
from .selection import CapacityFactor, capacity, positions, scores_TN


class SwitchGate(Gate):
    """Top-1 with capacity ``ceil(capacity_factor T / N)`` per expert and micro-batch; tokens without room are dropped.

    A dropped token's weight is 0: only the residual stream and shared neurons process it. Its expert still computes it
    (indices are unchanged), so dropping saves no time in native experts. The weight of a kept token is the
    router's own: a renormalising router with k = 1 always gives 1, through which no gradient reaches it; use one that
    does not renormalise.
    """

    name = "switch"
    summary = "top-1 with a capacity per expert, overflowing tokens dropped"
    reference = "arXiv:2101.03961"
    top_k: ClassVar[int | None] = 1

    class Options(PluginOptions):
        """Options of `SwitchGate`."""

        capacity_factor: CapacityFactor = 1.25
        priority: Literal["order", "probability"] = Field(
            "order", description="Who is served first: tokens in their order, or those whose expert is likeliest."
        )

    options: Options

    def route(self, moe: MoeLayer, native: Native, hidden: torch.Tensor) -> Gated:
        """See `Gate.route`. O(T log T)."""
        logits_TN, weights, indices = native(hidden)
        order_T = None
        if self.options.priority == "probability":
            likeliest_T = scores_TN(moe, logits_TN.detach()).gather(-1, indices)[:, 0]
            order_T = likeliest_T.argsort(descending=True, stable=True)
        room = capacity(self.options.capacity_factor, len(indices), moe)
        dropped_Tk = positions(indices[:, 0], order_T)[:, None] >= room
        return Gated(logits_TN, weights.masked_fill(dropped_Tk, 0), indices, {"dropped_Tk": dropped_Tk})
