"""No repair, by name: the control of every study of repairs."""

from __future__ import annotations

from ..layer import ExpertWeights, FfnWeights, LayerContext
from ..moe_layer import ConvertedFfn
from .base import Repair


class NoRepair(Repair):
    """The identity: weights are unchanged; a control."""

    name = "none"
    summary = "the weights are unchanged"
    needs = "nothing"

    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """See `Repair.repair`."""
        return moe.weights
