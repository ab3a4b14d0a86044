"""A control without routing: keep the best neurons, drop the others."""

from __future__ import annotations

from ...lazy import np
from ..layer import FfnWeights, LayerContext, Partition
from .base import Splitter, routed_neurons


class Static(Splitter):
    """Static pruning: the S shared neurons are the whole FFN, as in a dense model of a smaller intermediate_size.

    The baseline of a conversion: the same active neurons for every token, and no router. ``shared`` sets how many are
    kept, ``shared_by`` by which score; repair applies as elsewhere. Numbers of experts, router and rescale are ignored.
    """

    name = "static"
    summary = "control: keep the best neurons for every token, drop the rest (--shared 0.5); written as a dense model"
    reference = "after FLAP (arXiv:2312.11983); equal widths in all layers"
    parity = "none"
    default_shared = 0.5
    default_shared_by = "power"
    routed = False

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`."""
        experts = np.empty((context.num_experts, context.expert_width), np.int64)
        return Partition(experts, shared, routed_neurons(ffn.intermediate_size, shared))
