"""Read a model's sizes from its configuration and headers, for `llamamoe.training.estimate.estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...architectures.costs import role_of
from ...architectures.expert_weighting import routes_attention
from ...architectures.sources.base import positive
from ...architectures.stored_experts import count_experts
from ...architectures.targets import TARGETS
from ...checkpoint.base import TensorInfo
from ...checkpoint.tensor_names import layer_of
from ..parameters import group_of


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        numel: Parameters of each group (`llamamoe.training.recipe.GROUPS`).
        largest: Parameters of the largest tensor of each group as held in memory, where a layer's experts are two
            tensors: gate and up of all experts, and down.
        expert_width: W; 0 in a layer without routed experts.
        shared_width: Neurons of the shared expert; 0: none.
        dense_width: Neurons of a dense FFN; 0: none.
        query_width: Heads times their size.
        key_width: Key heads times their size.
        qk_norm: Whether queries and keys are normalised.
        shared_gate: Whether the shared expert's output is multiplied by a gate.
        projections: Attention's weights: shape (out, in) by name of the module.
        routes_attention: Whether query heads are experts, too; then ``query_width`` is that of the selected ones.
    """

    numel: Mapping[str, int]
    largest: Mapping[str, int]
    expert_width: int
    shared_width: int
    dense_width: int
    query_width: int
    key_width: int
    qk_norm: bool
    shared_gate: bool
    projections: Mapping[str, tuple[int, ...]]
    routes_attention: bool = False

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(self.numel.values())


@dataclass(frozen=True)
class ModelShape:
    """A dense or converted model.

    Attributes:
        model_type: The ``model_type`` in the configuration.
        hidden_size: H.
        vocab_size: V.
        num_heads: Query heads.
        head_dim: Their size.
        num_experts: N; 0 for a dense model.
        top_k: k; 0 for a dense model.
        layers: In order of depth.
        embeddings: Parameters of the embedding.
        head: Parameters of the output head; 0 if it is the embedding.
        norms: Parameters outside the layers that are neither.
        dtype_bytes: Bytes of a parameter as stored, of the most frequent dtype.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    layers: tuple[LayerShape, ...]
    embeddings: int
    head: int
    norms: int
    dtype_bytes: int

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def tied(self) -> bool:
        """True if the head is the embedding."""
        return self.head == 0

    @property
    def total(self) -> int:
        """Number of all parameters, with a tied head once."""
        return self.embeddings + self.head + self.norms + sum(layer.total for layer in self.layers)

    @property
    def routed(self) -> int:
        """Number of parameters of all routed experts."""
        return sum(layer.numel.get("experts", 0) for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters that one token uses, counted as in `llamamoe.architectures.costs`."""
        inactive = self.routed * (self.num_experts - self.top_k) // self.num_experts if self.num_experts else 0
        return self.total - inactive - (0 if self.tied else self.embeddings)

    def by_group(self) -> dict[str, int]:
        """Return the parameters of each group, over the whole model."""
        found = {"embeddings": self.embeddings, "head": self.head, "norms": self.norms}
        for layer in self.layers:
            for group, numel in layer.numel.items():
                found[group] = found.get(group, 0) + numel
        return found


def read_shape(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelShape:
    """Read the sizes of a checkpoint.

    Args:
        config: Its ``config.json``.
        tensors: Headers of its files.

    Raises:
        CheckpointError: The configuration has no sizes, or tensors are in no known group.
    """
    hidden, (heads, size) = positive(config, "hidden_size"), _heads(config)
    layers: dict[int, dict[str, TensorInfo]] = {}
    outside = {"embeddings": 0, "head": 0, "norms": 0}
    widths: dict[int, int] = {}
    tied = bool(config.get("tie_word_embeddings", "lm_head.weight" not in tensors))
    for name, info in tensors.items():
        layer = layer_of(name)
        width = info.nbytes // max(1, info.numel)
        widths[width] = widths.get(width, 0) + info.numel
        if layer is not None:
            layers.setdefault(layer, {})[name] = info
        elif not (tied and group_of(name) == "head"):
            outside[group_of(name)] += info.numel
    experts = _experts(tensors)
    return ModelShape(
        model_type=str(config.get("model_type", "")),
        hidden_size=hidden,
        vocab_size=positive(config, "vocab_size"),
        num_heads=heads,
        head_dim=size,
        num_experts=experts,
        top_k=_top_k(config, experts) if experts else 0,
        layers=tuple(_layer(layers[index], hidden, config) for index in sorted(layers)),
        embeddings=outside["embeddings"],
        head=outside["head"],
        norms=outside["norms"],
        dtype_bytes=max(widths, key=lambda width: widths[width]),
    )


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return number and size of the query heads that a token uses."""
    name = str(config.get("model_type", ""))
    if routes_attention(name):
        return positive(config, "num_key_value_heads") * positive(config, TARGETS.get(name).top_k_key), positive(
            config, "kv_channels"
        )
    heads = positive(config, "num_attention_heads")
    return heads, positive(config, "head_dim", max(positive(config, "hidden_size") // heads, 1))


def _top_k(config: Mapping[str, Any], num_experts: int) -> int:
    name = str(config.get("model_type", ""))
    key = TARGETS.get(name).top_k_key if name in TARGETS else "num_experts_per_tok"
    return min(positive(config, key), num_experts)


def _experts(tensors: Mapping[str, TensorInfo]) -> int:
    """Return N; 0 if there are no experts."""
    routed = {name: info for name, info in tensors.items() if group_of(name) == "experts"}
    return count_experts(routed) if routed else 0


def _layer(tensors: Mapping[str, TensorInfo], hidden: int, config: Mapping[str, Any]) -> LayerShape:
    numel: dict[str, int] = {}
    largest: dict[str, int] = {}
    projections: dict[str, tuple[int, ...]] = {}
    for name, info in tensors.items():
        group = group_of(name)
        numel[group] = numel.get(group, 0) + info.numel
        largest[group] = max(largest.get(group, 0), info.numel)
        if group == "attention" and name.endswith("_proj.weight"):
            projections[name.removesuffix(".weight").rpartition(".")[2]] = info.shape
    routed = sum(info.numel for name, info in tensors.items() if role_of(name) == "routed")
    if routed:
        largest["experts"] = max(routed * 2 // 3, largest["experts"])
    heads, size = _heads(config)
    keys = positive(config, "num_key_value_heads", heads)
    shared = sum(i.numel for n, i in tensors.items() if group_of(n) == "shared" and len(i.shape) > 1)
    dense = sum(i.numel for n, i in tensors.items() if group_of(n) == "dense_ffn" and len(i.shape) > 1)
    return LayerShape(
        numel=numel,
        largest=largest,
        expert_width=routed // (3 * hidden * _experts(tensors)) if routed else 0,
        shared_width=shared // (3 * hidden),
        dense_width=dense // (3 * hidden),
        query_width=heads * size,
        key_width=keys * size,
        qk_norm=any("q_norm" in name for name in tensors),
        shared_gate=any("shared_expert_gate" in name for name in tensors),
        projections=projections,
        routes_attention=numel.get("experts", 0) > routed,
    )
