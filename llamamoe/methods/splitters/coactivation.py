"""Group neurons that are active together."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...lazy import np, torch
from ...numerics import check_finite
from ...plugins import PluginOptions
from ..layer import BATCH_TOKENS, FfnWeights, LayerContext, LayerInputs, Partition
from .base import Splitter, routed_neurons

Kernel = Literal["plain", "l1_norm", "l2_norm"]


class Coactivation(Splitter):
    """MoEfication's graph split: balanced parts of the co-activation graph that cut little weight.

    The calibration tokens are taken in runs of ``sample_tokens``, and

        w_ij = sum over runs of min(sum over tokens t of the run of f(h_ti) f(h_tj), clamp),   i != j,

    where f is h itself (``plain``), |h| (``l1_norm``) or h^2 (``l2_norm``), as in LLaMA-MoE; with ReLU and no
    clamp this is MoEfication's ``sum_t h_ti h_tj 1[h_ti > 0, h_tj > 0]``. Weights below 0.99 x the ``percentile`` are
    set to 0, as are negative ones (LLaMA-MoE: percentile 10 and clamp 1; with SwiGLU's activations that clamp
    leaves nearly all weights equal). ``cosine`` divides by ``sqrt(w_ii w_jj)``, before the percentile: otherwise the
    graph mostly reflects which neurons are large.

    ``spectral`` finds the parts itself, ``metis`` uses the METIS library, as the papers do; parts are then made
    equal by moving as few neurons as possible, and improved by swaps (see `llamamoe.methods.solvers.graph`).
    """

    name = "coactivation"
    summary = "MoEfication: balanced parts of the graph of neurons that are active together"
    reference = "MoEfication (arXiv:2110.01786), co-activation graph split; LLaMA-MoE's GraphSplit"
    needs = "activations"
    default_rescale = "unit"
    default_router = "ridge"
    default_shared = 0.25
    default_shared_by = "power"

    class Options(PluginOptions):
        """Options of `Coactivation`."""

        kernel: Kernel = Field("l1_norm", description="Function of h that is multiplied: h, |h| or its square.")
        cosine: bool = Field(
            True, description="Divide each weight by the geometric mean of its two neurons' own activity."
        )
        clamp: float | None = Field(None, gt=0, description="Maximum weight that one run of tokens can add to a pair.")
        sample_tokens: int = Field(2048, ge=1, description="Tokens in a run (only relevant with a clamp).")
        percentile: float = Field(0.0, ge=0, lt=100, description="Share of the weakest edges that are left out, in %.")
        partitioner: Literal["spectral", "metis"] = Field(
            "spectral", description="spectral: built in; metis: needs the extra 'graph'."
        )
        starts: int = Field(1, ge=1, description="Number of starts; the best is kept.")
        sweeps: int = Field(20, ge=0, description="Maximum number of sweeps of improving swaps; 0 for none.")

    options: Options

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`. O(T F^2) for the graph; the sizes of the experts differ by one at most."""
        from ..solvers.graph import partition_graph

        options = self.options
        neurons = routed_neurons(ffn.intermediate_size, shared)
        sums = coactive_sums(ffn, neurons, context.inputs, options.kernel, options.clamp, options.sample_tokens)
        check_finite(context.layer, sums)
        labels = partition_graph(
            graph_weights(sums.numpy(), cosine=options.cosine, percentile=options.percentile),
            context.num_experts,
            context.rng(self.name),
            method=options.partitioner,
            starts=options.starts,
            sweeps=options.sweeps,
        )
        return Partition.from_labels(neurons, labels, context, shared)

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """See `Splitter.working_bytes`: four float32 matrices ``[F, F]`` and a batch of activations."""
        return 4 * intermediate_size * (4 * intermediate_size + 3 * BATCH_TOKENS + 2 * hidden_size)


def coactive_sums(
    ffn: FfnWeights, neurons: np.ndarray, inputs: LayerInputs, kernel: Kernel, clamp: float | None, sample_tokens: int
) -> torch.Tensor:
    """Return float32 ``[R, R]`` on the CPU, R = len(neurons): the sums ``w_ij`` of `Coactivation`, with i = j too.

    Runs of tokens are counted from the first token on, whatever the batch size of ``inputs``.
    """
    index = torch.from_numpy(neurons)
    routed = FfnWeights(ffn.gate_FH[index], ffn.up_FH[index], ffn.down_HF[:, index], ffn.norm_H, ffn.hidden_act)
    total = torch.zeros(len(neurons), len(neurons), device=inputs.device)
    for h_BR in replace(inputs, batch_tokens=sample_tokens).hidden(routed):
        f_BR = {"plain": h_BR, "l1_norm": h_BR.abs(), "l2_norm": h_BR.square()}[kernel]
        if clamp is None:
            total.addmm_(f_BR.T, f_BR)
        else:
            total += (f_BR.T @ f_BR).clamp_(max=clamp)
    return total.cpu()


def graph_weights(sums_RR: np.ndarray, *, cosine: bool, percentile: float) -> np.ndarray:
    """Return float32 ``[R, R]``: the co-activations as a graph; >= 0, diagonal 0. ``sums_RR`` is changed in place."""
    if cosine:
        own = np.sqrt(sums_RR.diagonal().clip(0))
        inverse = np.where(own > 0, 1 / np.where(own > 0, own, 1), 0).astype(np.float32)
        sums_RR *= inverse
        sums_RR *= inverse[:, None]
    np.fill_diagonal(sums_RR, 0)
    np.maximum(sums_RR, 0, out=sums_RR)
    if percentile and len(sums_RR) > 1:
        sums_RR[sums_RR < 0.99 * np.percentile(sums_RR, percentile)] = 0
    # Products of blocks round differently above and below the diagonal.
    return np.asarray((sums_RR + sums_RR.T) / 2)
