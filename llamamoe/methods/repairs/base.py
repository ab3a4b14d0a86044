"""The interface of a repair: new weights for a converted layer whose output is closer to the dense one's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ...plugins import Needs, Plugin
from ..layer import ExpertWeights, FfnWeights, LayerContext
from ..moe_layer import ConvertedFfn
from ..splitters.base import Kept


class Repair(Plugin, ABC):
    """Fits weights of a converted layer, given its partition and router, to the dense FFN on calibration inputs.

    Repair gives up exactness on purpose: its weights are not copies of the parent's neurons.

    Attributes:
        keeps: The part of the parent's neurons that it keeps bit for bit, which verification checks.
    """

    needs: ClassVar[Needs] = "activations"
    keeps: ClassVar[Kept] = "gate_up"

    @abstractmethod
    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """Return new weights for the layer.

        Args:
            moe: The layer without repair (or after the previous pass).
            ffn: The parent's FFN, whose output on ``context.inputs`` is the target.
            context: Sizes, seed and calibration inputs.
        """

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """Return an estimate of the memory that `repair` takes for P = ``places``, for the plan."""
        return 0
