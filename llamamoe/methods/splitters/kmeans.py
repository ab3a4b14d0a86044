"""Group neurons whose input weights have similar directions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...lazy import np, torch
from ...plugins import PluginOptions
from ..layer import FfnWeights, LayerContext, Partition
from .base import Splitter, routed_neurons


class KMeans(Splitter):
    """Independent-Clustering: balanced k-means of the L2-normalised gate (or up) rows.

    Neurons with similar rows are active together, so that a token needs few experts. Each assignment step is solved
    exactly with at most W neurons per expert.
    """

    name = "kmeans"
    summary = "balanced k-means of the neurons' normalised gate (or up) rows"
    reference = "LLaMA-MoE (arXiv:2406.16554), Independent-Clustering; MoEfication (arXiv:2110.01786)"
    needs = "weights"
    default_router = "centroid"

    class Options(PluginOptions):
        """Options of `KMeans`."""

        weight: Literal["gate", "up"] = Field("gate", description="The matrix whose rows are clustered.")
        max_iter: int = Field(50, ge=1, description="Maximum number of iterations per start.")
        n_init: int = Field(1, ge=1, description="Number of starts; the best is kept.")
        tol: float = Field(
            1e-3, ge=0, description="Minimum gain of an iteration, as a share of the explained variance."
        )

    options: Options

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`. O(F H N) per iteration; three float32 copies of one matrix at most."""
        from ..solvers.clustering import balanced_kmeans

        neurons = routed_neurons(ffn.intermediate_size, shared)
        clusters = balanced_kmeans(
            _unit_rows(ffn, neurons, self.options.weight),
            context.num_experts,
            context.expert_width,
            seed=int(context.rng("kmeans").integers(2**32)),
            n_init=self.options.n_init,
            max_iter=self.options.max_iter,
            tol=self.options.tol,
        )
        return Partition.from_labels(neurons, clusters.labels, context, shared)


def _unit_rows(ffn: FfnWeights, neurons: np.ndarray, weight: Literal["gate", "up"]) -> np.ndarray:
    """Return float32 ``[F - S, H]``: the neurons' rows at length 1 (a zero row stays zero)."""
    matrix = ffn.gate_FH if weight == "gate" else ffn.up_FH
    rows = matrix[torch.from_numpy(neurons)].float()
    # Rows that are not finite count as zero: the conversion warns about them and stays exact.
    return torch.nn.functional.normalize(rows, dim=1).nan_to_num_(nan=0.0).numpy()
