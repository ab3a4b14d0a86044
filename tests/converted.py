"""Tiny random converted layers, and what they compute written out plainly: a loop per token, expert and place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llamamoe.methods.layer import PADDING, ExpertWeights, FfnWeights, LayerContext, LayerInputs, Partition
from llamamoe.methods.moe_layer import ConvertedFfn

HIDDEN, NEURONS, EXPERTS, TOP_K, SHARED, WIDTH = 8, 24, 4, 2, 6, 5


def make_ffn(seed: int = 0, dtype: torch.dtype = torch.float32) -> FfnWeights:
    """An FFN of 24 neurons on 8 dimensions."""
    g = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, NEURONS, HIDDEN, generator=g)
    down = torch.randn(HIDDEN, NEURONS, generator=g)
    return FfnWeights(gate.to(dtype), up.to(dtype), down.to(dtype), torch.ones(HIDDEN))


def make_inputs(tokens: int = 200, batch_tokens: int = 64, seed: int = 0, hidden: int = HIDDEN) -> LayerInputs:
    """Inputs with a mean, and residual streams of very different sizes."""
    g = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(tokens, hidden, generator=g) + torch.linspace(-0.5, 0.5, hidden)
    scale = torch.randn(tokens, generator=g).exp()
    return LayerInputs(x, scale, torch.device("cpu"), torch.float32, batch_tokens=batch_tokens)


def make_partition(kind: str = "padded", seed: int = 0) -> Partition:
    """``padded``: 6 shared, 18 in 4 x 5 places; ``overlap``: two neurons in two experts, one omitted; ``plain``: 4 x 6."""
    order = np.random.default_rng(seed).permutation(NEURONS)
    none = np.empty(0, np.int64)
    if kind == "plain":
        return Partition(np.sort(order.reshape(EXPERTS, 6), axis=1), none, none)
    shared, rest = np.sort(order[:SHARED]), order[SHARED:]
    experts = np.full((EXPERTS, WIDTH), PADDING)
    for i, part in enumerate(np.array_split(rest, EXPERTS)):
        experts[i, : len(part)] = np.sort(part)
    if kind == "overlap":
        experts[0, 0], experts[1, 1] = experts[1, 0], experts[2, 0]
        kept = np.concatenate([shared, experts.ravel()])
        return Partition(experts, shared, np.setdiff1d(np.arange(NEURONS), kept))
    return Partition(experts, shared, none)


def make_moe(ffn: FfnWeights, partition: Partition | None = None, seed: int = 0, **keys: Any) -> ConvertedFfn:
    """A converted layer with a random router; hard with c = 1 unless told otherwise."""
    partition = partition or make_partition()
    num_experts = len(partition.experts)
    g = torch.Generator().manual_seed(200 + seed)
    settings: dict[str, Any] = {
        "weights": ExpertWeights.of_parent(ffn, partition),
        "router_NH": torch.randn(num_experts, HIDDEN, generator=g),
        "top_k": TOP_K,
        "scale": "hard",
        "weighting": "softmax",
        "factor": float(num_experts),
    }
    return ConvertedFfn(partition=partition, **(settings | keys))


def make_context(moe: ConvertedFfn, inputs: LayerInputs | None, layer: int = 3) -> LayerContext:
    return LayerContext(layer, moe.num_experts, moe.top_k, moe.partition.experts.shape[1], 0, inputs)


def plain_hidden(gate: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """float64 ``[T, rows]``: silu(gate x) (up x)."""
    a, b = (x.double().numpy() @ w.double().numpy().T for w in (gate, up))
    return a / (1 + np.exp(-a)) * b


def plain_expert_weights(moe: ConvertedFfn, x: torch.Tensor) -> np.ndarray:
    """float64 ``[T, N]``: the weights of the experts, token by token."""
    out = np.zeros((len(x), moe.num_experts))
    for t, logits in enumerate(x.double().numpy() @ moe.router_NH.double().numpy().T):
        chosen = sorted(range(moe.num_experts), key=lambda i: -logits[i])[: moe.top_k]
        for i in chosen:
            values = np.zeros(moe.num_experts) if moe.scale == "hard" else logits
            if moe.weighting == "renormalised":
                out[t, i] = np.exp(values[i]) / sum(np.exp(values[j]) for j in chosen)
            elif moe.weighting == "softmax":
                out[t, i] = np.exp(values[i]) / sum(np.exp(v) for v in values)
            elif moe.weighting == "sigmoid":
                out[t, i] = 1 / (1 + np.exp(-values[i]))
            else:
                out[t, i] = 1 / (1 + np.exp(-values[i])) / sum(1 / (1 + np.exp(-values[j])) for j in chosen)
    return out * moe.factor


def plain_weighted_hidden(moe: ConvertedFfn, x: torch.Tensor) -> np.ndarray:
    """float64 ``[T, P]``: every place's activation times its weight, place by place."""
    hidden, weights = plain_hidden(moe.weights.gate_PH, moe.weights.up_PH, x), plain_expert_weights(moe, x)
    shared, width = len(moe.partition.shared), moe.partition.experts.shape[1]
    for p in range(shared, hidden.shape[1]):
        hidden[:, p] *= weights[:, (p - shared) // width]
    return hidden


def plain_dense(ffn: FfnWeights, x: torch.Tensor) -> np.ndarray:
    """float64 ``[T, H]``: the dense FFN."""
    return plain_hidden(ffn.gate_FH, ffn.up_FH, x) @ ffn.down_HF.double().numpy().T


def plain_error(moe: ConvertedFfn, ffn: FfnWeights, x: torch.Tensor, down_HP: torch.Tensor) -> np.ndarray:
    """float64 ``[T, H]``: dense minus converted, with these down projections."""
    return plain_dense(ffn, x) - plain_weighted_hidden(moe, x) @ down_HP.double().numpy().T
