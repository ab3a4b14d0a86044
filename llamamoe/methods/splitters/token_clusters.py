"""Build experts that a linear router can find: clusters of tokens, then neurons, then both in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pydantic import Field

from ...lazy import np, torch
from ...plugins import PluginOptions
from ..layer import BATCH_TOKENS, FfnWeights, LayerContext, LayerInputs, Partition, TokenWeighting, token_scales
from ..routers.ridge import Ridge
from ..solvers.balance import assign_balanced
from .base import Splitter, routed_neurons


class TokenClusters(Splitter):
    """Spherical k-means of the FFN's inputs gives N centroids; neurons are assigned where they are needed most.

    With ``A_tc`` = 1 if expert c is among the k that token t selects, the power that the selected experts hold is

        sum_t s_t^2 sum_j h_tj^2 ||down_j||^2 A_t,e(j)  =  sum_j M[j, e(j)],
        M[j, c] = ||down_j||^2 sum_t s_t^2 h_tj^2 A_tc

    so that for a given selection the best experts ``e(j)`` of equal size are an assignment problem, solved exactly
    (`llamamoe.methods.solvers.balance`). At first a token selects its k nearest centroids. Then, ``rounds`` times, a
    router is fitted to the experts (ridge regression of their log contributions, as in
    `llamamoe.methods.routers.ridge`) and neurons are reassigned by its selection. Experts and router thus adapt to each
    other; the last router's rows belong to the partition.

    Original to this project. LLaMA-MoE-v2 (arXiv:2411.15708) clusters inputs too, but uses the nearest centroid only
    where k experts will be selected, assigns greedily, and does not iterate.
    """

    name = "token_clusters"
    summary = "clusters of tokens, neurons assigned to the clusters that need them, router and experts in turn"
    needs = "activations"
    default_rescale = "unit"
    default_router = "ridge"
    default_shared = 0.25
    default_shared_by = "power"
    default_repair = "least_squares"

    class Options(PluginOptions):
        """Options of `TokenClusters`."""

        iterations: int = Field(15, ge=1, le=1000, description="Iterations of k-means.")
        rounds: int = Field(
            2, ge=0, le=100, description="Number of rounds of fitting a router and reassigning neurons."
        )
        ridge: float = Field(1e-3, ge=1e-9, allow_inf_nan=False, description="Strength of those routers' fit.")
        weighting: TokenWeighting = Field(
            "residual", description="residual: a token's power counts relative to its residual stream."
        )

    options: Options

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`. O(T F H) per round and O(T N H) per iteration."""
        inputs, neurons = context.inputs, routed_neurons(ffn.intermediate_size, shared)
        scales_T = token_scales(inputs, self.options.weighting)
        centroids_NH, mean_H = spherical_kmeans(context, self.options.iterations)
        logits = ((x_BH.float() - mean_H) @ centroids_NH.T for x_BH in inputs.inputs())
        partition = self._assign(ffn, neurons, shared, logits, scales_T, context)
        rows_NH = centroids_NH.cpu()
        for _ in range(self.options.rounds):
            rows_NH = self._fit(ffn, partition, context)
            moved = rows_NH.to(inputs.device)
            logits = (x_BH.float() @ moved.T for x_BH in inputs.inputs())
            partition = self._assign(ffn, neurons, shared, logits, scales_T, context)
        return replace(partition, router_NH=rows_NH)

    def _assign(
        self,
        ffn: FfnWeights,
        neurons: np.ndarray,
        shared: np.ndarray,
        logits: Iterator[torch.Tensor],
        scales_T: torch.Tensor | None,
        context: LayerContext,
    ) -> Partition:
        power_RN = captured_power(ffn, neurons, logits, scales_T, context)
        labels = assign_balanced(-power_RN / max(float(power_RN.max(initial=0.0)), 1e-300), context.expert_width)
        return Partition.from_labels(neurons, labels, context, shared)

    def _fit(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        options = Ridge.Options(contribution="power", ridge=self.options.ridge)
        return Ridge(options).rows(ffn, partition, context)

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """See `Splitter.working_bytes`: a batch of activations, twice, and a Gram of the inputs in float64."""
        return 8 * BATCH_TOKENS * intermediate_size + 16 * hidden_size**2


def captured_power(
    ffn: FfnWeights,
    neurons: np.ndarray,
    logits: Iterator[torch.Tensor],
    scales_T: torch.Tensor | None,
    context: LayerContext,
) -> np.ndarray:
    """Return float64 ``[R, N]``: each routed neuron's power on the tokens of each expert, M of `TokenClusters`.

    Args:
        ffn: The layer.
        neurons: int64 ``[R]``, the routed ones.
        logits: ``[B, N]`` for every batch of inputs; the k largest are selected.
        scales_T: Factor of each token's output; None for all ones.
        context: The context with k, N and the inputs.
    """
    inputs = context.inputs
    index = torch.from_numpy(neurons).to(inputs.device)
    total_RN = torch.zeros(len(neurons), context.num_experts, dtype=torch.float64)
    for part, h_BF, logits_BN in zip(inputs.batches(), inputs.hidden(ffn), logits, strict=True):
        power_BR = h_BF[:, index].square_()
        if scales_T is not None:
            power_BR *= scales_T[part].to(power_BR.device).square()[:, None]
        chosen_BN = torch.zeros_like(logits_BN).scatter_(1, logits_BN.topk(context.top_k, dim=1).indices, 1.0)
        total_RN += (power_BR.T @ chosen_BN.to(power_BR.dtype)).double().cpu()
    down_R = ffn.down_HF.float().square().sum(0).double()[torch.from_numpy(neurons)]
    return (total_RN * down_R[:, None]).numpy()


def spherical_kmeans(context: LayerContext, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit centroids float32 ``[N, H]`` of the inputs minus their mean, and that mean ``[H]``.

    The mean is subtracted because it is large behind an RMSNorm and does not distinguish tokens; each input then
    counts only by its direction (Dhillon and Modha, 2001). An empty cluster starts again at a random token.
    """
    inputs, num_experts = context.inputs, context.num_experts
    rng = context.rng("token_clusters")
    mean_H = _mean(inputs)
    tokens = inputs.num_tokens
    seeds = rng.choice(tokens, size=num_experts, replace=tokens < num_experts)
    centroids_NH = torch.nn.functional.normalize(
        inputs.x_TH[torch.from_numpy(seeds)].to(inputs.device).float() - mean_H, dim=1
    )
    for _ in range(iterations):
        sums_NH = torch.zeros_like(centroids_NH, dtype=torch.float32)
        for x_BH in inputs.inputs():
            centred_BH = (x_BH.float() - mean_H).to(x_BH.dtype)
            nearest_B = (centred_BH @ centroids_NH.to(x_BH.dtype).T).argmax(1)  # whatever the input's length
            length_B = centred_BH.norm(dim=1, dtype=torch.float32).clamp(min=1e-12)
            # A product instead of index_add_, whose sums have no fixed order on GPUs.
            member_NB = torch.zeros(num_experts, len(x_BH), device=x_BH.device)
            member_NB.scatter_(0, nearest_B[None], 1 / length_B[None])
            sums_NH += (member_NB.to(x_BH.dtype) @ centred_BH).float()
        empty = (sums_NH.square().sum(1) == 0).nonzero().flatten().cpu()
        again = torch.from_numpy(rng.integers(tokens, size=len(empty)))
        sums_NH[empty.to(sums_NH.device)] = inputs.x_TH[again].to(inputs.device).float() - mean_H
        centroids_NH = torch.nn.functional.normalize(sums_NH, dim=1)
    return centroids_NH, mean_H


def _mean(inputs: LayerInputs) -> torch.Tensor:
    total_H = torch.zeros(inputs.x_TH.shape[1], device=inputs.device)
    for x_BH in inputs.inputs():
        total_H += x_BH.float().sum(0)
    return total_H / max(inputs.num_tokens, 1)
