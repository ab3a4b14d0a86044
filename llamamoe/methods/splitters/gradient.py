"""Assign neurons to the kind of text for whose loss they matter most."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, Field

from ...lazy import np, torch
from ...numerics import check_finite
from ...plugins import PluginOptions
from ..layer import PADDING, ExpertWeights, FfnWeights, LayerContext, LayerInputs, Partition
from .base import Kept, Splitter, routed_neurons

SAMPLE = 16384
"""Maximum number of clustered tokens; every token is then assigned to the centroid that its router would choose."""
LARGEST = 1.4
"""Maximum tokens in one cluster of inputs, in units of the mean (LLaMA-MoE-v2, without its minimum of 0.6)."""


class Gradient(Splitter):
    """One expert per cluster of text, with the neurons that matter most for the loss on it.

    With the gradient of the parent's loss at neuron j, ``g_tj = dL/dh_tj = down_:j . dL/dy_t``, the importance of
    neuron j in cluster c is ``mean over t in c of kernel(v_tj)``, where ``v`` is ``g h`` (``feature_change``: to first
    order, what the loss gains if the neuron is dropped) or ``g`` (``feature_grad``), and the kernel is ``|v|``
    (``l1_norm``), ``v^2`` (``l2_norm``) or ``v`` (``plain``). The mean gives clusters of different size equal weight
    (LLaMA-MoE sums over clusters of similar size, v2 takes the mean). dL/dy comes from the dense parent, h from the
    inputs of this layer after the layers that are already converted.

    ``clusters``: ``text`` uses the calibration text's clusters, N of them (LLaMA-MoE). ``hidden`` clusters this FFN's
    inputs (v2's "gradient split plus"): balanced k-means of the inputs scaled to length 1, every token belongs to
    ``argmax_c x . centroid_c``, and the centroids become the partition's router rows.

    ``overlap``:

    - ``none``: every neuron in one expert. ``assignment`` ``greedy`` takes the most important pair (expert, neuron)
      that is still possible, repeatedly, as in LLaMA-MoE; ``optimal`` is the assignment of the largest total
      importance. Exact.
    - ``inner`` (Sharing-Inner): expert c has the W most important neurons of cluster c. Neurons may be in several
      experts or in none, so that it is not exact. As in the paper (``duplicates: plain``), a neuron counts as
      often as it is selected; ``scaled`` divides the down column of a neuron with n copies by the number of
      copies that k of N experts chosen at random hold if they hold one, ``(n k / N) / (1 - C(N-n, k) / C(N, k))``.
    - ``inter`` (Sharing-Inter): the S shared neurons are those in the preferred sets of most experts; ``shared_by`` is
      ignored. Each expert prefers its most important neurons, as many as it will hold; those preferred most often
      become shared, all of the same count at once, the experts refill, and so on until there are S (of equal ones,
      those with the largest importance in sum; the paper's code takes the first). The rest is split as with ``none``.
      Exact.

    Experts are selected because they matter, not at random, so a selected one counts as in the parent: the rescale
    ``unit`` suits every variant.
    """

    name = "gradient"
    summary = "neurons by importance |h dL/dh| per text cluster; overlap inner (sharing) or inter (residual block)"
    reference = "LLaMA-MoE (arXiv:2406.16554), Sharing-Inner and -Inter; LLaMA-MoE-v2 (arXiv:2411.15708)"
    needs = "gradients"
    default_rescale = "unit"
    default_router = "ridge"  # LLaMA-MoE trains its gate from scratch; v2 uses the centroids (hidden_centroid)

    class Options(PluginOptions):
        """Options of `Gradient`."""

        importance: Literal["feature_change", "feature_grad"] = Field(
            "feature_change", description="Gradient times activation, or the gradient alone."
        )
        kernel: Literal["l1_norm", "l2_norm", "plain"] = Field(
            "l1_norm", description="Function averaged over the tokens: absolute value, square, or the value itself."
        )
        clusters: Literal["text", "hidden"] = Field(
            "text", description="Clusters of calibration sequences, or of this FFN's inputs (then also router rows)."
        )
        overlap: Literal["none", "inner", "inter"] = Field(
            "none", description="Exclusive; neurons in several experts (not exact); or a shared block that it chooses."
        )
        assignment: Literal["greedy", "optimal"] = Field(
            "greedy", description="How exclusive neurons are assigned: the paper's rule, or the optimum."
        )
        duplicates: Literal["scaled", "plain"] = Field(
            "scaled", description="With overlap inner: whether copies of a neuron are scaled down."
        )

    options: Options

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.overlap = self.options.overlap == "inner"
        self.chooses_shared = self.options.overlap == "inter"

    @property
    def exact(self) -> bool:
        """See `Splitter.exact`: not if neurons may be missing."""
        return self.options.overlap != "inner"

    @property
    def kept(self) -> Kept:
        """See `Splitter.kept`."""
        return "gate_up" if self._scaled else "neurons"

    @property
    def needs_clusters(self) -> bool:
        """See `Splitter.needs_clusters`."""
        return self.options.clusters == "text"

    @property
    def _scaled(self) -> bool:
        return self.overlap and self.options.duplicates == "scaled"

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`. O(T F H) for the importance; ``N F`` float64 of it are kept.

        Raises:
            ValueError: There are no gradients, or no text clusters although required.
            LlamaMoeError: An importance is not finite.
        """
        from dataclasses import replace

        from ..solvers.allocation import best_of_each, most_wanted

        router_NH, labels_T = self._clusters(context)
        score_NF = self.importance(ffn, labels_T, context)
        if self.chooses_shared:
            # the neurons of an expert, without the zero neurons that pad it
            width = -(-(ffn.intermediate_size - len(shared)) // context.num_experts)
            shared = most_wanted(score_NF, width, len(shared))
        neurons = routed_neurons(ffn.intermediate_size, shared)
        score_NF = score_NF[:, neurons]
        if self.overlap:
            partition = best_of_each(score_NF, neurons, shared, context)
        else:
            labels = self._assign(score_NF, context.expert_width)
            partition = Partition.from_labels(neurons, labels, context, shared)
        return replace(partition, router_NH=router_NH)

    def weights(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> ExpertWeights | None:
        """See `Splitter.weights`: the parent's, the down columns of copies scaled."""
        from ..solvers.allocation import expected_copies

        if not self._scaled:
            return None
        weights = ExpertWeights.of_parent(ffn, partition)
        copies = np.bincount(partition.experts[partition.experts != PADDING], minlength=ffn.intermediate_size)
        seen = expected_copies(context.num_experts, context.top_k)[copies]
        factors = np.where(copies > 0, 1 / np.where(copies > 0, seen, 1), 1.0)[partition.slots]
        weights.down_HP.mul_(torch.from_numpy(factors).float())
        return weights

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """See `Splitter.working_bytes`: the sample of inputs that is clustered, and a copy of it."""
        return 2 * 4 * SAMPLE * hidden_size

    def _assign(self, score_NF: np.ndarray, capacity: int) -> np.ndarray:
        from ..solvers.allocation import assign_greedily
        from ..solvers.balance import assign_balanced

        if self.options.assignment == "greedy":
            return assign_greedily(score_NF, capacity)
        return assign_balanced(-score_NF.T, capacity)

    # ---- importance -----------------------------------------------------------------------------------------------

    def _clusters(self, context: LayerContext) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return router rows if the clusters have centroids, and int64 ``[T]``, the cluster of each token, 0 .. N-1."""
        if self.options.clusters == "hidden":
            return input_clusters(context)
        labels_T = context.inputs.clusters_T
        if labels_T is None:
            raise ValueError("this method needs the text cluster of every calibration token")
        if labels_T.min() < 0 or labels_T.max() >= context.num_experts:
            raise ValueError(f"text clusters must lie in 0..{context.num_experts - 1}, one for each expert")
        return None, labels_T

    def importance(self, ffn: FfnWeights, labels_T: torch.Tensor, context: LayerContext) -> np.ndarray:
        """Return float64 ``[N, F]``: see the class; 0 in a cluster without tokens."""
        inputs = context.inputs
        if inputs.gradients_TH is None:
            raise ValueError("this method needs gradients at the FFN's output")
        down_HF = ffn.down_HF.to(inputs.device, inputs.compute_dtype)
        total_NF = torch.zeros(context.num_experts, ffn.intermediate_size, dtype=torch.float64)
        for part, h_BF in zip(inputs.batches(), inputs.hidden(ffn), strict=True):
            value_BF = (inputs.gradients_TH[part].to(inputs.device, inputs.compute_dtype) @ down_HF).float()
            if self.options.importance == "feature_change":
                value_BF = value_BF * h_BF
            if self.options.kernel != "plain":
                value_BF = value_BF.abs() if self.options.kernel == "l1_norm" else value_BF.square()
            member_BN = torch.nn.functional.one_hot(labels_T[part], context.num_experts).to(value_BF)
            total_NF += (member_BN.T @ value_BF).cpu().double()
        check_finite(context.layer, total_NF)
        count_N = torch.bincount(labels_T, minlength=context.num_experts).clamp(min=1)
        return (total_NF / count_N[:, None]).numpy()


def input_clusters(context: LayerContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute balanced clusters of the FFN's inputs.

    Returns:
        float32 ``[N, H]`` centroids of the inputs scaled to length 1, and int64 ``[T]``, the cluster of each token.
    """
    from ..solvers.clustering import balanced_kmeans

    inputs = context.inputs
    rng = context.rng("gradient")
    size = min(SAMPLE, inputs.num_tokens)
    chosen = torch.from_numpy(rng.choice(inputs.num_tokens, size, replace=False)).sort().values
    points = torch.nn.functional.normalize(inputs.x_TH[chosen].float(), dim=1).numpy()
    clusters = balanced_kmeans(
        points, context.num_experts, math.ceil(LARGEST * size / context.num_experts), seed=int(rng.integers(2**32))
    )
    centers_NH = torch.from_numpy(clusters.centers)
    return centers_NH, _nearest(inputs, centers_NH)


def _nearest(inputs: LayerInputs, rows_NH: torch.Tensor) -> torch.Tensor:
    """Return int64 ``[T]``: the row of the largest scalar product with each input."""
    rows_NH = rows_NH.to(inputs.device)
    return torch.cat([(x_BH.float() @ rows_NH.T).argmax(1).cpu() for x_BH in inputs.inputs()])
