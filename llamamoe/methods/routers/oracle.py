"""A router that uses every expert's contribution: a control, which cannot be stored in a checkpoint."""

from __future__ import annotations

from ...errors import RefusedError
from ...lazy import torch
from ..layer import FfnWeights, LayerContext, Partition
from .base import Router


class Oracle(Router):
    """A control that selects the experts with the largest contribution: the upper bound of routing by contribution.

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
            "the oracle router computes every expert before it chooses: it is a control that cannot be stored in a model.",
            hint="`llamamoe compare` simulates it; to convert, use another router, for example ridge.",
        )
