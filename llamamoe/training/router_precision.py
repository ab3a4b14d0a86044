"""Routers in float32 where autocast would compute their logits in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..lazy import torch
from .moe_layers import MoeLayer


def route_in_float32(layers: Sequence[MoeLayer]) -> None:
    """Compute these routers' logits, and what follows from them, in the dtype of their weights, outside of autocast.

    Logits of bfloat16 have 8 bits: experts whose logits differ by less than half a percent tie, and are chosen by their
    number. Call it before a gate takes the routers over.

    Args:
        layers: Layers whose routers' weights are float32.
    """
    for moe in layers:
        moe.router.forward = _forward(moe.router)


def _forward(router: Any) -> Any:
    native = router.forward

    def forward(hidden: torch.Tensor) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return native(hidden.to(next(router.parameters()).dtype))

    return forward
