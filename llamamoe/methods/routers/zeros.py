"""A router of zeros."""

from __future__ import annotations

from ...lazy import torch
from ..layer import FfnWeights, LayerContext, Partition
from .base import Router


class Zeros(Router):
    """All logits equal: every token goes to the same experts until the router is trained."""

    name = "zeros"
    summary = "zero rows: all experts get equal weights, ties decide which are selected"
    reference = "LLaMA-MoE (arXiv:2406.16554), linear gate"

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`."""
        return torch.zeros(context.num_experts, ffn.hidden_size)
