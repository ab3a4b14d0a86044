"""The contract of a router initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ...lazy import torch
from ...plugins import Plugin
from ..layer import FfnWeights, LayerContext, Partition
from ..moe_layer import ConvertedFfn


class Router(Plugin, ABC):
    """Gives the rows of a linear router; logits are ``router_NH @ x`` with ``x`` the FFN's (normalised) input.

    Attributes:
        exportable: Whether the rows can be written; False for controls that only a study may simulate.
    """

    exportable: ClassVar[bool] = True

    @abstractmethod
    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """float32 ``[N, H]``, before the recipe's router scale is applied."""

    def refit(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> torch.Tensor:
        """float32 ``[N, H]``: rows for the repaired layer ``moe``; by default the rows it has."""
        return moe.router_NH
