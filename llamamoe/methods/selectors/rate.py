"""Select neurons that are among the most active on most tokens of the calibration text."""

from __future__ import annotations

from ...lazy import np
from ..layer import FfnWeights, LayerContext
from ..markers import MarkerOptions, activation_markers, activation_rates
from .base import Selector


class Rate(Selector):
    """``mu_j = mean_t A_tj``: the share of tokens on which neuron j has one of the ``k_act`` largest activations."""

    name = "rate"
    summary = "share of calibration tokens at which the neuron is among the most active"
    reference = "CMoE (arXiv:2502.04416), activation rate"
    needs = "activations"

    class Options(MarkerOptions):
        """Options of `Rate`."""

    options: Options

    def scores(self, ffn: FfnWeights, context: LayerContext) -> np.ndarray:
        """See `Selector.scores`. O(T F H)."""
        return activation_rates(activation_markers(ffn, context, self.options))
