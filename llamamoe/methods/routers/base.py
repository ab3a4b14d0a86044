"""The interface of a router initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ...lazy import torch
from ...plugins import Plugin
from ..layer import FfnWeights, LayerContext, Partition
from ..moe_layer import ConvertedFfn


class Router(Plugin, ABC):
    """A method that initialises the rows of a linear router.

    Logits are ``router_NH @ x`` with ``x`` the FFN's (normalised) input.

    Attributes:
        exportable: Whether the rows can be written; False for controls that only a study may simulate.
    """

    exportable: ClassVar[bool] = True

    @abstractmethod
    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """Return the rows, float32 ``[N, H]``, before the recipe's router scale is applied."""

    def refit(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> torch.Tensor:
        """Return float32 ``[N, H]``: rows for the repaired layer ``moe``; by default its current ones."""
        return moe.router_NH
