"""The contract of a selector: which neurons every token uses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...lazy import np
from ...plugins import Plugin
from ..layer import FfnWeights, LayerContext


class Selector(Plugin, ABC):
    """Ranks the neurons of a layer; the best S become shared."""

    @abstractmethod
    def scores(self, ffn: FfnWeights, context: LayerContext) -> np.ndarray:
        """float64 ``[F]``; higher means more deserving to be shared."""

    def select(self, ffn: FfnWeights, num_shared: int, context: LayerContext) -> np.ndarray:
        """int64 ``[S]``, ascending: the neurons of the highest scores; of equal ones the first."""
        if num_shared == 0:
            return np.empty(0, np.int64)
        order = np.argsort(-self.scores(ffn, context), kind="stable")
        return np.sort(order[:num_shared]).astype(np.int64)
