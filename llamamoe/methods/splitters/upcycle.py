"""Sparse upcycling: make every expert a copy of the FFN, or of one of its parts."""

from __future__ import annotations

from pydantic import Field

from ...lazy import np, torch
from ...plugins import PluginOptions
from ..layer import PADDING, ExpertWeights, FfnWeights, LayerContext, Partition
from .base import Kept, Splitter, routed_neurons


class Upcycle(Splitter):
    """A larger model to train further: N copies of the FFN, of which k are averaged (rescale ``mean``, c = 1/k).

    ``groups = G`` divides the FFN into G parts of consecutive neurons (Megatron's granularity): expert i holds part
    ``i mod G``, and the G experts ``jG .. jG + G - 1`` have the same router row, so that one top-k, a multiple of G,
    selects complete sets of parts. With c = G/k the output is the FFN's at every such k. Soft router weights that sum
    to 1 keep that too; hard ones are refused, because two sets of near-equal logits become a tie that may be split
    anywhere.

    ``reinit = r`` re-initialises a share r of every expert's neurons, gate, up and down, from a normal distribution
    with the mean and standard deviation of the same rows (columns) of that matrix (Drop-Upcycling): copies that start
    differently specialise. The paper's code draws different indices for each of the three matrices, so that for r = 1/2
    only one neuron in eight is kept, one in eight is new, and the rest mix an old part with noise. Here, as in the
    paper's formula, one set of neurons is new in all three: kept neurons compute the same as in the parent.

    Shared neurons, if requested, are stored once beside the copies of the rest.
    """

    name = "upcycle"
    summary = "every expert a copy of the whole FFN (or of one of its parts), optionally partly re-initialised"
    reference = (
        "sparse upcycling (arXiv:2212.05055); Drop-Upcycling (arXiv:2502.19261); virtual groups (arXiv:2410.07524)"
    )
    default_rescale = "mean"
    overlap = True

    class Options(PluginOptions):
        """Options of `Upcycle`."""

        reinit: float = Field(0.0, ge=0, le=1, description="Share of each expert's neurons that is re-initialised.")
        groups: int = Field(
            1, ge=1, description="Number of parts of the FFN (granularity); N and k are multiples of it."
        )

    options: Options

    @property
    def exact(self) -> bool:
        """See `Splitter.exact`: not with re-initialised neurons."""
        return self.options.reinit == 0

    @property
    def kept(self) -> Kept:
        """See `Splitter.kept`."""
        return "neurons" if self.exact else "nothing"

    def parts(self, num_experts: int) -> int:
        """See `Splitter.parts`."""
        return self.options.groups

    def refusals(self, num_experts: int, top_k: int, router_scale: str) -> list[str]:
        """See `Splitter.refusals`."""
        groups = self.options.groups
        found = []
        if num_experts % groups or top_k % groups:
            found.append(
                f"num_experts = {num_experts} and top_k = {top_k} must be multiples of groups = {groups}, so that whole "
                "sets of parts are selected"
            )
        if groups > 1 and router_scale == "hard":
            found.append(
                "a hard router creates near-ties of different sets, which would mix their parts: use --router-scale soft, "
                "which is as exact for copies"
            )
        return found

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`."""
        neurons = np.array_split(routed_neurons(ffn.intermediate_size, shared), self.options.groups)
        experts = np.full((context.num_experts, context.expert_width), PADDING, np.int64)
        for i, row in enumerate(experts):
            part = neurons[i % self.options.groups]
            row[: len(part)] = part
        return Partition(experts, shared, np.empty(0, np.int64))

    def weights(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> ExpertWeights | None:
        """See `Splitter.weights`: ``round(reinit x neurons)`` of every expert are new. O(N W H)."""
        if self.exact:
            return None
        weights = ExpertWeights.of_parent(ffn, partition)
        rng = context.rng("upcycle")
        start = len(partition.shared)
        for expert in partition.experts:
            real = int((expert != PADDING).sum())
            places = start + rng.permutation(real)[: round(self.options.reinit * real)]
            for rows in (weights.gate_PH, weights.up_PH, weights.down_HP.T):
                _renew(rows, places, rng)
            start += len(expert)
        return weights

    def tie(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """See `Splitter.tie`: a set of parts has the row of its first expert."""
        groups = self.options.groups
        return rows_NH[::groups].repeat_interleave(groups, dim=0)


def _renew(rows_PH: torch.Tensor, places: np.ndarray, rng: np.random.Generator) -> None:
    """Redraw these rows in place from a normal distribution with their mean and standard deviation."""
    index = torch.from_numpy(places)
    old = rows_PH[index]
    if old.numel():
        std, mean = torch.std_mean(old.double(), correction=0)
        noise = torch.from_numpy(rng.standard_normal(tuple(old.shape), np.float32))
        rows_PH[index] = noise * float(std) + float(mean)
