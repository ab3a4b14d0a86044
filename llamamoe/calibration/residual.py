"""The residual stream behind a layer, as the next norm sees it."""

from __future__ import annotations

from ..architectures.sources.base import DenseSpec
from ..lazy import torch


def next_normed(spec: DenseSpec, after_BH: torch.Tensor, y_BH: torch.Tensor) -> torch.Tensor:
    """Return what the next norm divides by its root mean square, ``[B, H]``.

    That is the residual stream behind the layer (without its mean for LayerNorms), or the FFN's output where norms follow
    the FFN.

    Args:
        spec: The dense parent.
        after_BH: The residual stream after attention.
        y_BH: Outputs of the FFN.
    """
    if spec.post_norm:
        return y_BH
    sum_BH = after_BH + y_BH * spec.residual_multiplier
    return sum_BH - sum_BH.mean(-1, keepdim=True) if spec.layer_norm else sum_BH
