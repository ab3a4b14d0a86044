"""The interface of a selector, which chooses the neurons that every token uses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...lazy import np
from ...plugins import Plugin
from ..layer import FfnWeights, LayerContext


class Selector(Plugin, ABC):
    """A ranking of the neurons of a layer, of which the best S become shared."""

    @abstractmethod
    def scores(self, ffn: FfnWeights, context: LayerContext) -> np.ndarray:
        """Return float64 ``[F]``; neurons with higher scores are shared first."""

    def select(self, ffn: FfnWeights, num_shared: int, context: LayerContext) -> np.ndarray:
        """Return int64 ``[S]``, ascending: the neurons with the highest scores; the first of equal ones."""
        if num_shared == 0:
            return np.empty(0, np.int64)
        order = np.argsort(-self.scores(ffn, context), kind="stable")
        return np.sort(order[:num_shared]).astype(np.int64)
