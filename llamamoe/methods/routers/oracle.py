"""The router that knows what every expert would contribute: a control, which no checkpoint can hold."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ...errors import RefusedError
from ...lazy import torch
from ...plugins import PluginOptions
from ..contributions import Contribution, contributions
from ..layer import ExpertWeights, FfnWeights, LayerContext, LayerInputs, Partition
from .base import Router

LEAST_CONTRIBUTION = 1e-30
"""Contributions below this count as this, so that their logarithm is a number."""


class Oracle(Router):
    """Takes the experts of largest contribution to the token, computed from all experts: the bound of routing by it.

    It has no rows: a study simulates it with `oracle_logits`.
    """

    name = "oracle"
    summary = "control, never written: the experts that contribute most to the token"
    needs = "activations"
    exportable = False

    class Options(PluginOptions):
        """Options of `Oracle`."""

        contribution: Contribution = Field(
            "norm", description="norm: ||E_i(x)||^2; power: the sum of its neurons' powers."
        )

    options: Options

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`.

        Raises:
            RefusedError: Always.
        """
        raise RefusedError(
            "the oracle router computes every expert before it chooses: it is a control that no model can hold.",
            hint="`llamamoe compare` simulates it; to convert, take another router, for example ridge.",
        )

    def logits(
        self,
        weights: FfnWeights | ExpertWeights,
        partition: Partition,
        inputs: LayerInputs,
        *,
        hidden_act: str = "silu",
    ) -> Iterator[torch.Tensor]:
        """`oracle_logits` with the contribution of the options."""
        return oracle_logits(weights, partition, inputs, kind=self.options.contribution, hidden_act=hidden_act)


def oracle_logits(
    weights: FfnWeights | ExpertWeights,
    partition: Partition,
    inputs: LayerInputs,
    *,
    kind: Contribution = "norm",
    hidden_act: str = "silu",
) -> Iterator[torch.Tensor]:
    """Log contributions, for `ConvertedFfn.expert_weights`: float32 ``[B, N]``, in batches on the inputs' device."""
    for score_BN in contributions(weights, partition, inputs, kind=kind, hidden_act=hidden_act):
        yield score_BN.clamp(min=LEAST_CONTRIBUTION).log()
