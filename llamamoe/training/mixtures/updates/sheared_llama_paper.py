"""Dynamic batch loading as the paper writes it."""

from __future__ import annotations

from ....lazy import np
from .base import MixtureUpdate, softmax


class ShearedLlamaPaper(MixtureUpdate):
    """``w exp(max(0, L - L_ref))``, normalised: domains that are better than their reference are not penalised."""

    name = "sheared_llama_paper"
    summary = "domains that lag behind their reference loss get more, by exp(max(0, loss - reference))"
    reference = "Xia et al. 2023, arXiv:2310.06694, algorithm 1"

    def rule(self, weights_D: np.ndarray, losses_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        """See `MixtureUpdate.rule`."""
        return softmax(np.log(weights_D) + np.maximum(0.0, losses_D - reference_D))
