"""The native routing: top-k, nothing dropped."""

from __future__ import annotations

from typing import ClassVar

from ...lazy import torch
from ..moe_layers import MoeLayer
from .base import Gate, Gated, Native


class TopK(Gate):
    """A control: routers route as after training, dropless and without noise. Their forward pass is unchanged."""

    name = "top_k"
    summary = "the native routing: the k best experts, no noise, nothing dropped"
    replaces: ClassVar[bool] = False

    def route(self, moe: MoeLayer, native: Native, hidden: torch.Tensor) -> Gated:
        """See `Gate.route`."""
        return Gated(*native(hidden))
