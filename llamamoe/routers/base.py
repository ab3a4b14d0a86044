"""The contract of a router initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ..plugin import Plugin

if TYPE_CHECKING:
    import torch

    from ..layer import FfnWeights, LayerContext, Partition


class Router(Plugin, ABC):
    """Gives the rows of a linear router; logits are ``router_NH @ x`` with ``x`` the FFN's (normalised) input."""

    @abstractmethod
    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """float32 ``[N, H]``, before the recipe's router scale is applied."""
