"""Partition neurons at random, with a seed."""

from __future__ import annotations

from ...lazy import np
from ..layer import FfnWeights, LayerContext, Partition
from .base import Splitter, routed_neurons


class Random(Splitter):
    """Independent-Random: neurons are partitioned at random; sizes differ by at most one."""

    name = "random"
    summary = "seeded random partition, the one of the released LLaMA-MoE models"
    reference = "LLaMA-MoE (arXiv:2406.16554), Independent-Random"

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`. O(F)."""
        neurons = routed_neurons(ffn.intermediate_size, shared)
        labels = np.arange(len(neurons)) % context.num_experts
        context.rng(self.name).shuffle(labels)
        return Partition.from_labels(neurons, labels, context, shared)
