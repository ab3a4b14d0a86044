"""Multiplicative noise on the router's input."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..moe_layers import MoeLayer
from .base import Gate, Gated, Native


class Jitter(Gate):
    """The router's input is multiplied by uniform noise from ``[1 - eps, 1 + eps)``, element by element.

    Only the router's: experts see the clean input (Mixtral's own ``router_jitter_noise`` in transformers disturbs
    theirs too). Losses and statistics use the logits of the noisy input.
    """

    name = "jitter"
    summary = "top_k with uniform multiplicative noise on the router's input"
    reference = "arXiv:2101.03961"
    kept_TH: ClassVar[int] = 1  # the noise; the noisy input is kept instead of the input

    class Options(PluginOptions):
        """Options of `Jitter`."""

        eps: float = Field(0.01, gt=0, lt=1, description="Largest relative change of an input.")

    options: Options

    def route(self, moe: MoeLayer, native: Native, hidden: torch.Tensor) -> Gated:
        """See `Gate.route`."""
        eps = self.options.eps
        noise = torch.empty(hidden.shape, device=hidden.device, dtype=torch.float32)
        noise.uniform_(1 - eps, 1 + eps, generator=self.generator(moe, hidden.device))
        return Gated(*native((hidden * noise).to(hidden.dtype)))
