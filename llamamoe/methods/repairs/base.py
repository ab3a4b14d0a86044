"""The contract of a repair: how a converted layer's weights change so that its output comes near the dense one's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ...plugins import Needs, Plugin
from ..layer import ExpertWeights, FfnWeights, LayerContext
from ..moe_layer import ConvertedFfn
from ..splitters.base import Kept


class Repair(Plugin, ABC):
    """Fits weights of a converted layer, given its partition and router, to the dense FFN on calibration inputs.

    Repair ends exactness on purpose: what it returns is no copy of the parent's neurons.

    Attributes:
        keeps: What of the parent's neurons it leaves as it is, bit for bit: verification holds the file to that.
    """

    needs: ClassVar[Needs] = "activations"
    keeps: ClassVar[Kept] = "gate_up"

    @abstractmethod
    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """New weights for the layer.

        Args:
            moe: The layer as it would run without repair (or after the pass before).
            ffn: The parent's FFN, whose output on ``context.inputs`` is the aim.
            context: Sizes, seed and calibration inputs.
        """

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """Estimate of the memory that `repair` takes for P = ``places``, for the plan."""
        return 0
