"""Use the mean gate row of each expert as its router row."""

from __future__ import annotations

from ...lazy import torch
from ..layer import PADDING, FfnWeights, LayerContext, Partition
from .base import Router


class Centroid(Router):
    """Row of expert i = mean over its neurons of ``gate_j / ||gate_j||`` (without padding).

    A token whose direction is that of an expert's gate rows opens many of that expert's gates.
    """

    name = "centroid"
    summary = "mean L2-normalised gate row of each expert"
    reference = "MoEfication (arXiv:2110.01786), parameter centre"
    needs = "weights"

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`. O(N W H); one expert in float32 at a time."""
        rows = torch.zeros(context.num_experts, ffn.hidden_size)
        for i, expert in enumerate(partition.experts):
            members = torch.from_numpy(expert[expert != PADDING])
            if len(members):
                rows[i] = torch.nn.functional.normalize(ffn.gate_FH[members].float(), dim=1).mean(0)
        return rows
