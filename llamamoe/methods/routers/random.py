"""A normal random router."""

from __future__ import annotations

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..layer import FfnWeights, LayerContext, Partition
from .base import Router


class Random(Router):
    """Rows drawn from a normal distribution, the usual start of a router that will be trained."""

    name = "random"
    summary = "normal random rows, to be trained"
    reference = "LLaMA-MoE (arXiv:2406.16554)"

    class Options(PluginOptions):
        """Options of the random router."""

        std: float = Field(0.02, gt=0, allow_inf_nan=False, description="Standard deviation of the rows.")

    options: Options

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`."""
        shape = (context.num_experts, ffn.hidden_size)
        return torch.from_numpy(context.rng("router").normal(0.0, self.options.std, shape)).float()
