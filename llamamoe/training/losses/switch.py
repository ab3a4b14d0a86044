"""Balance of load and probability: the auxiliary loss of GShard and Switch Transformers."""

from __future__ import annotations

from typing import ClassVar

from ...lazy import torch
from ..routing import Routing
from .base import LossContext, RoutingLoss, WindowOptions


class Switch(RoutingLoss):
    """``N sum_e f_e P_e`` per layer, then the mean over layers.

    ``f_e`` is expert e's share of all ``T k`` assignments as the router chose them (before capacity), ``P_e`` the mean
    over tokens of its probability; gradient flows through P only. The value is 1 at perfect balance for every k, and
    up to N/k if all tokens choose the same experts.

    For k = 1 this is equation 4 of Switch Transformers. Mixtral's own loss in transformers counts assignments per
    *token* (its f sums to k, so its value at balance is k: divide its usual coefficient by k), pools all layers before
    the product, so that opposite imbalances of two layers cancel, and its effective weight grows with accumulation
    steps and ranks. Not linear in the batch: see `Window`.
    """

    name = "switch"
    summary = "load times mean probability per layer, 1 at perfect balance"
    reference = "arXiv:2101.03961"
    linear: ClassVar[bool] = False

    class Options(WindowOptions):
        """Options of `Switch`."""

    options: Options

    def layer_loss(self, routing: Routing, context: LossContext) -> torch.Tensor:
        """See `RoutingLoss.layer_loss`. O(T N)."""
        probabilities_TN = routing.probabilities_TN
        counts_N = routing.wanted_counts_N().to(probabilities_TN.dtype)
        sums_2N = context.reduce(torch.stack([counts_N, probabilities_TN.sum(0)]), self.options.window)
        load_N = sums_2N[0] / sums_2N[0].sum()
        mean_N = sums_2N[1] / sums_2N[1].sum()  # rows of sum 1: the sum over experts is the number of tokens
        return routing.moe.num_experts * (load_N.detach() * mean_N).sum()
