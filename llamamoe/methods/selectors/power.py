"""Select neurons with the largest contribution to the output on the calibration text."""

from __future__ import annotations

from ...lazy import np, torch
from ..layer import FfnWeights, LayerContext
from .base import Selector


class Power(Selector):
    """``mean_t h_tj^2 * ||down_:j||^2``: the mean square of neuron j's contribution to the output."""

    name = "power"
    summary = "mean power of the neuron's contribution on calibration text"
    reference = "after FLAP (arXiv:2312.11983) without its mean: a gated FFN has no bias to hold it"
    needs = "activations"

    def scores(self, ffn: FfnWeights, context: LayerContext) -> np.ndarray:
        """See `Selector.scores`. O(T F H)."""
        total = torch.zeros(ffn.intermediate_size, dtype=torch.float64)
        for h_BF in context.inputs.hidden(ffn):
            total += h_BF.square().sum(0).double().cpu()
        down = ffn.down_HF.float().square().sum(0).double()
        return (total / context.inputs.num_tokens * down).numpy()
