"""The router that is told what every expert contributes: a control, which no checkpoint can hold."""

from __future__ import annotations

from ...errors import RefusedError
from ...lazy import torch
from ..layer import FfnWeights, LayerContext, Partition
from .base import Router


class Oracle(Router):
    """A control. Takes the experts of largest contribution to the token, computed from all: the bound of routing by it.

    It has no rows: a study simulates it with `llamamoe.methods.contributions.contributions`.
    """

    name = "oracle"
    summary = "control, never written: the experts that contribute most to the token"
    needs = "activations"
    exportable = False

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`.

        Raises:
            RefusedError: Always.
        """
        raise RefusedError(
            "the oracle router computes every expert before it chooses: it is a control that no model can hold.",
            hint="`llamamoe compare` simulates it; to convert, take another router, for example ridge.",
        )
