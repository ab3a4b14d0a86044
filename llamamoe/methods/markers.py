"""Compute CMoE's activation markers, the most active neurons of each token, and distances between patterns.

Names of sizes: ``Q`` evaluated tokens, ``F`` neurons, ``K`` patterns for comparison. The markers
are a sparse binary matrix ``A`` [Q, F]: neuron j's pattern is its column. Everything that CMoE needs of patterns
follows from the scalar products ``A^T C``, so neither ``A`` nor its Gram matrix is ever dense in memory.

Reference: CMoE (arXiv:2502.04416), section on analytical expert construction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..lazy import np, scipy, torch
from ..numerics import check_finite
from ..plugins import PluginOptions
from .layer import FfnWeights, LayerContext, LayerInputs, activate

if TYPE_CHECKING:
    from collections.abc import Iterator


Distance = Literal["l1", "l2"]


class MarkerOptions(PluginOptions):
    """Options that define active neurons."""

    k_act: int = Field(10, ge=1, description="Neurons per token that count as active: those with the largest |h|.")
    normalised: bool = Field(
        True,
        description="Whether inputs, gate and up rows are normalised to length 1 before h is computed, as in CMoE.",
    )
    max_tokens: int = Field(65536, ge=1, description="Maximum number of tokens; of more, every n-th is used.")


def every_nth(inputs: LayerInputs, max_tokens: int) -> LayerInputs:
    """Return tokens 0, n, 2n, ... for the least n that leaves at most ``max_tokens``, whatever the batch size."""
    step = max(1, -(-inputs.num_tokens // max_tokens))
    if step == 1:
        return inputs
    return replace(
        inputs,
        x_TH=inputs.x_TH[::step],
        residual_scale_T=inputs.residual_scale_T[::step],
        gradients_TH=None if inputs.gradients_TH is None else inputs.gradients_TH[::step],
        clusters_T=None if inputs.clusters_T is None else inputs.clusters_T[::step],
    )


def activation_markers(ffn: FfnWeights, context: LayerContext, options: MarkerOptions) -> scipy.sparse.csr_array:
    """Return float64 CSR ``[Q, F]``: ``A_tj = 1`` if ``|h_tj|`` is among the token's ``k_act`` largest, else 0.

    ATopK of CMoE. O(Q F H); 12 Q k_act bytes, beside one batch of activations and the two matrices in the compute
    dtype.

    Raises:
        LlamaMoeError: An activation is NaN or infinite.
    """
    inputs = every_nth(context.inputs, options.max_tokens)
    k_act = min(options.k_act, ffn.intermediate_size)
    parts = []
    for h_BF in _hidden(ffn, inputs, options.normalised):
        top = h_BF.abs().topk(k_act, dim=1)
        check_finite(context.layer, top.values)
        parts.append(top.indices.cpu().numpy())
    columns = np.concatenate(parts).astype(np.int32) if parts else np.empty((0, k_act), np.int32)
    rows = np.arange(len(columns) + 1, dtype=np.int64) * k_act
    shape = (len(columns), ffn.intermediate_size)
    markers = scipy.sparse.csr_array((np.ones(columns.size), columns.ravel(), rows), shape=shape)
    markers.sort_indices()
    return markers


def _hidden(ffn: FfnWeights, inputs: LayerInputs, normalised: bool) -> Iterator[torch.Tensor]:
    """Yield ``h`` in batches float32 ``[B, F]``; of normalised inputs and rows if ``normalised``."""
    if not normalised:
        yield from inputs.hidden(ffn)
        return
    gate, up = (
        torch.nn.functional.normalize(w.float(), dim=1).to(inputs.device, inputs.compute_dtype)
        for w in (ffn.gate_FH, ffn.up_FH)
    )
    for x_BH in inputs.inputs():
        x_BH = torch.nn.functional.normalize(x_BH.float(), dim=1).to(inputs.compute_dtype)
        yield activate(x_BH @ gate.T, ffn.hidden_act) * (x_BH @ up.T).float()


def activation_rates(markers_QF: scipy.sparse.csr_array) -> np.ndarray:
    """Return float64 ``[F]``: ``mu_j = mean_t A_tj``."""
    return np.asarray(np.asarray(markers_QF.sum(0), np.float64) / max(markers_QF.shape[0], 1))


def mean_patterns(markers_QF: scipy.sparse.csr_array, members: list[np.ndarray]) -> np.ndarray:
    """Return float64 ``[Q, K]``: the mean marker column of each of K sets of neurons; zeros for an empty set."""
    sizes = np.array([len(m) for m in members], np.int64)
    sets = np.repeat(np.arange(len(members)), sizes)
    shape = (markers_QF.shape[1], len(members))
    neurons = np.concatenate(members) if members else np.empty(0, np.int64)
    mean_FK = scipy.sparse.csr_array((1 / sizes[sets], (neurons, sets)), shape=shape)
    return np.asarray((markers_QF @ mean_FK).toarray(), np.float64)


def pattern_distances(markers_QF: scipy.sparse.csr_array, patterns_QK: np.ndarray, kind: Distance) -> np.ndarray:
    """Return float64 ``[F, K]``: distance of every neuron's marker column to every pattern with values in 0..1.

    For a binary column a and a pattern c in 0..1, each ``|a_t - c_t|`` is ``a_t + c_t - 2 a_t c_t``, and its square is
    ``a_t + c_t^2 - 2 a_t c_t``. ``"l1"`` is the sum of the former, ``"l2"`` the square root of the sum of the latter
    (for two binary columns: the square root of the former). O(Q k_act K).
    """
    counts_F1 = np.asarray(markers_QF.sum(0), np.float64).reshape(-1, 1)
    scalar_FK = np.asarray(markers_QF.T @ patterns_QK)
    if kind == "l1":
        return np.asarray(counts_F1 + patterns_QK.sum(0) - 2 * scalar_FK)
    squares_K = np.einsum("qk,qk->k", patterns_QK, patterns_QK)
    return np.asarray(np.sqrt((counts_F1 + squares_K - 2 * scalar_FK).clip(0)))
