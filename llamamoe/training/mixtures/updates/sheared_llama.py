"""Dynamic batch loading as Sheared-LLaMA's and LLaMA-MoE's code does it."""

from __future__ import annotations

from pydantic import Field

from ....lazy import np
from ....plugins import PluginOptions
from .base import MixtureUpdate, softmax


class ShearedLlama(MixtureUpdate):
    """``softmax(log w + eta (L - L_ref))``, smoothed by a small uniform part.

    Domains that lag behind their reference get more. Unlike in the paper, the difference is not cut off at zero: a
    domain that is better than its reference loses weight.
    """

    name = "sheared_llama"
    summary = "domains that lag behind their reference loss get more, by exp(eta (loss - reference)), smoothed"
    reference = "Xia et al. 2023, arXiv:2310.06694, llmshearing/callbacks/dynamic_loading_callback.py"

    class Options(PluginOptions):
        """Options of `ShearedLlama`."""

        eta: float = Field(1.0, gt=0, allow_inf_nan=False, description="Step of the exponent.")
        smoothing: float = Field(1e-4, ge=0, lt=1, description="Share that all domains divide equally, c.")

    options: Options

    def rule(self, weights_D: np.ndarray, losses_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        """See `MixtureUpdate.rule`."""
        c = self.options.smoothing
        alpha_D = softmax(np.log(weights_D) + self.options.eta * (losses_D - reference_D))
        smoothed_D: np.ndarray = (1 - c) * alpha_D + c / len(alpha_D)  # it already sums to 1
        return smoothed_D
