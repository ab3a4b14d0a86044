"""The contract of a target: how one architecture of transformers spells a converted model.

Targets only spell: configuration keys, tensor names, and which number goes where. They decide no size and touch
no tensor; importing them imports neither torch nor transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...numerics import is_power_of_two
from ..rescales import Rescale
from ..sources.base import DenseSpec, common, layer_shapes

Role = Literal["embedding", "attention", "norm", "router", "routed", "shared", "dense_ffn", "stub", "head"]
Part = Literal["gate", "up", "down", "gate_up"]
Weighting = Literal["renormalised", "softmax", "sigmoid"]


@dataclass(frozen=True)
class Copy:
    """A canonical tensor as it is, times ``scale``; ``interleave`` re-orders the rows of that many heads for rotary pairs."""

    name: str
    scale: float = 1.0
    interleave: int = 0


NEARLY_ZERO = 1e-12
"""For the rows of a gate that must not move: a sigmoid of them is 1/2 to the last bit of float32, and yet they are not 0.

llama.cpp computes the gate of qwen2_moe's shared expert as silu(x) / x, which is no number where x is 0.
"""


@dataclass(frozen=True)
class Constant:
    """A tensor of one number: zeros for a bias the source lacks or a stub."""

    value: float = 0.0


@dataclass(frozen=True)
class Router:
    """The router's rows of this layer, ``[N, H]``."""


@dataclass(frozen=True)
class Neurons:
    """Rows (gate, up) or columns (down) of this layer's FFN, times ``scale``.

    ``expert`` is an index, ``"all"`` for all experts stacked into ``[N, ...]``, or ``"shared"``.
    """

    part: Part
    expert: int | Literal["all", "shared"]
    scale: float = 1.0


Origin = Copy | Constant | Router | Neurons


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write: what it is called, its shape, what it counts as, and what it is made of.

    ``dtype`` None means the dtype of the conversion; ``layer`` None means that it belongs to no layer.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    origin: Origin
    layer: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Combine:
    """How equal router weights become the coefficient that the rescale asks for.

    Attributes:
        weighting: What the router does with its scores.
        factor: What routed outputs are multiplied by, beyond the router's weight.
        bake: The part of ``factor`` that is baked into the experts' down projections.
        any_k: Whether the same file is right for every k.
        parity_factor: What the routed sum must be multiplied by, at k = N and equal weights, to equal the FFN.
    """

    weighting: Weighting
    factor: float
    bake: float
    any_k: bool
    parity_factor: float

    @property
    def bake_is_exact(self) -> bool:
        """Whether baking rounds nothing: the factor is a power of two."""
        return is_power_of_two(self.bake)


@dataclass(frozen=True)
class MoeLayout:
    """The decided sizes of a conversion.

    Attributes:
        num_experts: N.
        top_k: k.
        expert_width: W, padding included.
        num_shared: S, real neurons.
        shared_width: Width of the shared expert as stored, zero padding included (0 if the target stores none).
        dense_layers: Layers that stay dense, ascending.
        combine: See `Combine`.
        copies: How many experts hold each routed neuron: 1 for a partition, more for upcycling, 0 if there are no
            experts.
    """

    num_experts: int
    top_k: int
    expert_width: int
    num_shared: int
    shared_width: int
    dense_layers: tuple[int, ...]
    combine: Combine
    copies: int = 1

    @property
    def active_share(self) -> float:
        """k/N, the share of the routed experts that one token uses (0 if there are none)."""
        return self.top_k / self.num_experts if self.num_experts else 0.0

    def padding(self, intermediate_size: int) -> int:
        """Zero neurons that pad the experts of one layer of F = ``intermediate_size`` neurons."""
        return self.num_experts * self.expert_width - self.copies * (intermediate_size - self.num_shared)


def weight(weighting: Weighting, num_experts: int, top_k: int) -> float:
    """What one selected expert's weight is when all logits are equal (zero)."""
    return {"renormalised": 1 / top_k, "softmax": 1 / num_experts, "sigmoid": 0.5}[weighting]


class Target(ABC):
    """An architecture that transformers ships.

    Attributes:
        name: Its ``model_type``.
        architecture: The name of its causal language model class.
        summary: One line for ``llamamoe methods``.
        reference: Where the architecture is described.
        weightings: What its router can be told to do, the preferred first.
        scaling_knob: Whether the configuration can hold the factor, so that nothing is baked.
        shared: ``"none"``, ``"any"`` width, or ``"multiple"`` of the expert width.
        dense_layers: Which layers can stay dense: ``"none"``, ``"leading"``, ``"ends"`` (leading and trailing), ``"any"``.
        shared_bake: What the shared expert's down projection is multiplied by.
        unties: Whether a tied head is written out as a tensor of its own.
        holds: Features of a dense source beyond plain Llama that the architecture computes exactly.
        needs_five: Source features that need transformers 5 in this architecture.
        routed: Whether it has experts; False for the dense architectures.
        ffn_modules: The modules of a transformers 5 decoder layer whose outputs together are the FFN's.
        top_k_key: The configuration key of k.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    weightings: ClassVar[tuple[Weighting, ...]] = ("renormalised",)
    scaling_knob: ClassVar[bool] = False
    shared: ClassVar[Literal["none", "any", "multiple"]] = "none"
    dense_layers: ClassVar[Literal["none", "leading", "ends", "any"]] = "none"
    shared_bake: ClassVar[float] = 1.0
    unties: ClassVar[bool] = False
    holds: ClassVar[frozenset[str]] = frozenset()
    needs_five: ClassVar[frozenset[str]] = frozenset()
    routed: ClassVar[bool] = True
    ffn_modules: ClassVar[tuple[str, ...]] = ("mlp",)
    top_k_key: ClassVar[str] = "num_experts_per_tok"

    # ---- what it can hold -------------------------------------------------------------------------------------

    def refusals(self, dense: DenseSpec) -> list[str]:
        """Why this architecture cannot compute exactly what the source computes; empty if it can."""
        reasons = []
        for feature, sentence in source_features(dense).items():
            if feature not in self.holds:
                reasons.append(f"{self.name} cannot hold {sentence}")
        return reasons

    def majors(self, dense: DenseSpec) -> tuple[str, ...]:
        """The versions of transformers that load the result: ``("4.57", "5")`` or ``("5",)``."""
        return ("5",) if self.needs_five & set(source_features(dense)) else ("4.57", "5")

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """What a user of this architecture should know about runtimes other than transformers."""
        return []

    def head_notes(self, dense: DenseSpec) -> list[str]:
        """What it costs that a tied head is written out, if it is (see `unties`)."""
        if not (self.unties and dense.tie_word_embeddings):
            return []
        size = dense.vocab_size * dense.hidden_size
        return [
            f"{self.name} needs an output head of its own in several runtimes: the tied head is written out (+{size:,} parameters)"
        ]

    def dense_layer_refusal(self, dense_layers: tuple[int, ...], num_layers: int) -> str | None:
        """Why these layers cannot stay dense, or None."""
        if not dense_layers or self.dense_layers == "any":
            return None
        if self.dense_layers == "none":
            return f"{self.name} has no dense layers, so --keep-dense is not possible"
        lead = leading(dense_layers)
        trail = trailing(dense_layers, num_layers) if self.dense_layers == "ends" else 0
        if lead + trail == len(dense_layers):
            return None
        where = "first" if self.dense_layers == "leading" else "first and last"
        return f"{self.name} can keep only the {where} layers dense, not {list(dense_layers)}"

    # ---- how it is read back ----------------------------------------------------------------------------------

    def dense_spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """What is around the FFNs of a checkpoint of this architecture, as a dense model of their full size would have it.

        ``intermediate_size`` is what the configuration says and means nothing where all layers are MoE layers.

        Raises:
            CheckpointError: A key is missing or has an impossible value.
        """
        return common(self.name, config, **self.attention_spec(config))

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a `DenseSpec` that this architecture spells in its own way."""
        return {}

    # ---- how it is spelled ------------------------------------------------------------------------------------

    @abstractmethod
    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """The keys of ``config.json`` that are this architecture's own (see `common_config` for the others)."""

    @abstractmethod
    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """Router, experts and shared expert of one layer."""

    @abstractmethod
    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """The configuration keys that make the only layer of a one-layer model dense or MoE."""

    def attention_tensors(self, dense: DenseSpec, layer: int) -> Iterator[OutTensor]:
        """Norms and attention of one layer; by default every canonical tensor under its own name."""
        prefix = f"model.layers.{layer}."
        for name, shape in layer_shapes(dense).items():
            if not name.startswith("mlp."):
                role: Role = "norm" if "norm" in name else "attention"
                yield OutTensor(prefix + name, shape, role, Copy(prefix + name), layer)

    def dense_ffn_tensors(self, dense: DenseSpec, layer: int) -> Iterator[OutTensor]:
        """The FFN of a layer that stays dense."""
        prefix = f"model.layers.{layer}."
        for name, shape in layer_shapes(dense).items():
            if name.startswith("mlp."):
                yield OutTensor(prefix + name, shape, "dense_ffn", Copy(prefix + name), layer)

    def tensors(self, dense: DenseSpec, layout: MoeLayout) -> Iterator[OutTensor]:
        """Every tensor of the output, in the order of a forward pass."""
        fold = self.fold(dense)
        table = (dense.vocab_size, dense.hidden_size)
        embed = "model.embed_tokens.weight"
        yield OutTensor(embed, table, "embedding", Copy(embed, scale=fold))
        for layer in range(dense.num_layers):
            yield from self.attention_tensors(dense, layer)
            if layer in layout.dense_layers:
                yield from self.dense_ffn_tensors(dense, layer)
            else:
                yield from self.moe_tensors(dense, layout, layer)
        yield OutTensor("model.norm.weight", (dense.hidden_size,), "norm", Copy("model.norm.weight"))
        if not self.ties(dense):
            yield OutTensor(
                "lm_head.weight", table, "head", Copy(embed if dense.tie_word_embeddings else "lm_head.weight")
            )

    def fold(self, dense: DenseSpec) -> float:
        """What the embedding table is multiplied by because the architecture has no ``embedding_multiplier``."""
        return 1.0 if "multipliers" in self.holds else dense.embedding_multiplier

    def ties(self, dense: DenseSpec) -> bool:
        """Whether the output's head is tied to its embedding."""
        return dense.tie_word_embeddings and not self.unties and self.fold(dense) == 1.0

    def stub_width(self, layout_width: int) -> int:
        """Width of the zero shared expert written when there are no shared neurons; 0 if none is needed."""
        return 0

    def combine(self, rescale: Rescale, num_experts: int, top_k: int, copies: int = 1) -> Combine:
        """Choose the router's weighting and the factor so that each selected expert counts ``c`` (see `Rescale`).

        With ``w`` the router's weight of one expert, the factor is ``c / w``. The first weighting for which it does
        not depend on k is taken, so that one file is right at every k; else the first weighting. With ``copies``
        experts for each neuron, N / copies experts are the whole FFN, and all N of them are ``copies`` times too much.
        """
        best: Combine | None = None
        for weighting in self.weightings:
            factors = [
                rescale.coefficient(num_experts // copies, k) / weight(weighting, num_experts, k)
                for k in range(1, num_experts + 1)
            ]
            factor = factors[top_k - 1]
            any_k = all(abs(f - factor) <= 1e-12 * abs(factor) for f in factors)
            bake = 1.0 if self.scaling_knob else factor
            parity = 1.0 / (copies * factor * weight(weighting, num_experts, num_experts))
            parity = 1.0 if abs(parity - 1.0) < 1e-12 else parity
            found = Combine(weighting, factor, bake, any_k, parity)
            if any_k:
                return found
            best = best or found
        assert best is not None
        return best


def leading(layers: tuple[int, ...]) -> int:
    """How many of the (ascending) layers are 0, 1, 2, ... without a gap."""
    return next((i for i, layer in enumerate(layers) if layer != i), len(layers))


def trailing(layers: tuple[int, ...], num_layers: int) -> int:
    """How many of the (ascending) layers are the last ones without a gap, the leading run left out."""
    rest = layers[leading(layers) :]
    return leading(tuple(num_layers - 1 - layer for layer in reversed(rest)))


def source_features(dense: DenseSpec) -> dict[str, str]:
    """What a source has beyond plain Llama: feature name and a phrase for messages."""
    found = {}
    if dense.mlp_bias:
        found["mlp_bias"] = (
            "biases in the FFN (mlp_bias): no architecture of transformers has SwiGLU experts with biases"
        )
    if dense.o_bias:
        found["o_bias"] = "a bias on the attention's output projection (attention_bias)"
    if dense.qkv_bias:
        found["qkv_bias"] = "biases on the query, key and value projections"
    if dense.qk_norm:
        found["qk_norm"] = "an RMSNorm on queries and keys"
    else:
        found["no_qk_norm"] = "attention without an RMSNorm on queries and keys (it always applies one)"
    if not dense.plain_head_dim:
        found["head_dim"] = f"head_dim = {dense.head_dim}, which is not hidden_size / num_attention_heads"
    if dense.mixed_windows:
        found["mixed_windows"] = "a sliding window in some layers only"
    elif dense.window is not None:
        found["window"] = f"a sliding window ({dense.window})"
    if dense.partial_rotary_factor != 1.0:
        found["partial_rotary"] = (
            f"rotary positions on a part of each head (partial_rotary_factor = {dense.partial_rotary_factor})"
        )
    plain_scale = dense.attention_multiplier in (None, dense.head_dim**-0.5)
    if dense.residual_multiplier != 1.0 or dense.logits_scaling != 1.0 or not plain_scale:
        found["multipliers"] = "attention, residual or logits multipliers"
    return found


def common_config(dense: DenseSpec, target: Target, dtype: str) -> dict[str, Any]:
    """The keys that all targets share, with both spellings of rope (transformers 4 reads one, 5 the other)."""
    scaling = {k: v for k, v in dense.rope.items() if k != "rope_theta"}
    plain = scaling == {"rope_type": "default"}
    config: dict[str, Any] = {
        "architectures": [target.architecture],
        "model_type": target.name,
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": dense.num_layers,
        "num_attention_heads": dense.num_heads,
        "num_key_value_heads": dense.num_kv_heads,
        "head_dim": dense.head_dim,
        "hidden_act": dense.hidden_act,
        "max_position_embeddings": dense.max_position_embeddings,
        "rms_norm_eps": dense.rms_norm_eps,
        "tie_word_embeddings": target.ties(dense),
        "rope_theta": dense.rope["rope_theta"],
        "rope_scaling": None if plain else scaling,
        "rope_parameters": dict(dense.rope),
        "use_cache": True,
        **({"output_router_logits": False} if target.routed else {}),
        "torch_dtype": dtype,
        **dense.extra,
    }
    if "original_max_position_embeddings" in dense.rope:
        config["original_max_position_embeddings"] = dense.rope["original_max_position_embeddings"]
    return config


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_tensors(
    block: str, hidden: int, layout: MoeLayout, layer: int, names: tuple[str, str, str] = PROJECTIONS
) -> Iterator[OutTensor]:
    """Gate, up and down of every expert as tensors of their own, below ``block``; ``names`` is what they are called."""
    width = layout.expert_width
    for i in range(layout.num_experts):
        start = f"{block}experts.{i}."
        yield OutTensor(f"{start}{names[0]}.weight", (width, hidden), "routed", Neurons("gate", i), layer)
        yield OutTensor(f"{start}{names[1]}.weight", (width, hidden), "routed", Neurons("up", i), layer)
        down = Neurons("down", i, layout.combine.bake)
        yield OutTensor(f"{start}{names[2]}.weight", (hidden, width), "routed", down, layer)


def shared_tensors(prefix: str, hidden: int, layout: MoeLayout, bake: float, layer: int) -> Iterator[OutTensor]:
    """Gate, up and down of the shared expert, or of its zero stub."""
    width = layout.shared_width
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        origin: Origin = Constant()
        if layout.num_shared:
            origin = Neurons(part, "shared", bake if part == "down" else 1.0)  # type: ignore[arg-type]
        yield OutTensor(f"{prefix}{part}_proj.weight", shape, "shared" if layout.num_shared else "stub", origin, layer)
