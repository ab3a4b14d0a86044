"""The interface of a target: one architecture of transformers as the format of a converted model.

Targets only define configuration keys, tensor names, and which number goes where. They decide no size and touch
no tensor; importing them imports neither torch nor transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from ...checkpoint.whole_pairs import class_refusals
from ..moe_layout import Combine, Copy, MoeLayout, OutTensor, Role, RouterWeighting, Weighting, weight
from ..rescales import Rescale
from ..sources.base import DenseSpec, common, layer_shapes
from ..sources.features import source_features


class Target(ABC):
    """An architecture that transformers ships.

    Attributes:
        name: Its ``model_type``.
        architecture: The name of its causal language model class.
        summary: One line for ``llamamoe methods``.
        reference: A publication on the architecture.
        weightings: Normalisations that its router supports, the preferred first.
        scaling_knob: Whether the configuration can hold the factor, so that weights are not scaled.
        shared: ``"none"``, ``"any"`` width, a ``"multiple"`` of the expert width, or ``"one"`` of exactly that width.
        dense_layers: Which layers can stay dense: ``"none"``, ``"leading"``, ``"ends"`` (leading and trailing),
            ``"any"``.
        shared_bake: Factor of the shared expert's down projection.
        unties: Whether a tied head is written as a separate tensor.
        holds: Features of a dense source beyond plain Llama that the architecture computes exactly.
        needs_five: Source features that need transformers 5 in this architecture.
        only_five: Whether transformers 4.57 does not have the architecture.
        routed: Whether it has experts; False for the dense architectures.
        ffn_modules: The modules of a transformers 5 decoder layer whose outputs together are the FFN's.
        top_k_key: The configuration key of k.
        attention_experts: Whether attention is a mixture of experts, too (see `Heads`), with the N and k of the FFNs.
        derived: Keys of `common_config` that are not written, because its configuration class derives them.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    weightings: ClassVar[tuple[Weighting, ...]] = ("renormalised",)
    scaling_knob: ClassVar[bool] = False
    shared: ClassVar[Literal["none", "any", "multiple", "one"]] = "none"
    dense_layers: ClassVar[Literal["none", "leading", "ends", "any"]] = "none"
    shared_bake: ClassVar[float] = 1.0
    unties: ClassVar[bool] = False
    holds: ClassVar[frozenset[str]] = frozenset()
    needs_five: ClassVar[frozenset[str]] = frozenset()
    only_five: ClassVar[bool] = False
    routed: ClassVar[bool] = True
    ffn_modules: ClassVar[tuple[str, ...]] = ("mlp",)
    top_k_key: ClassVar[str] = "num_experts_per_tok"
    attention_experts: ClassVar[bool] = False
    derived: ClassVar[frozenset[str]] = frozenset()

    # ---- what it can hold -------------------------------------------------------------------------------------

    def refusals(self, dense: DenseSpec) -> list[str]:
        """Return the reasons why this architecture cannot compute exactly what the source does; empty if it can."""
        reasons = []
        for feature, sentence in source_features(dense).items():
            if feature not in self.holds:
                reasons.append(f"{self.name} cannot hold {sentence}")
        if {"qkv_bias", "o_bias"} <= self.holds and dense.qkv_bias != dense.o_bias:  # one key, attention_bias, for both
            reasons.append(f"{self.name} has biases on all four attention projections or on none")
        if dense.whole and self.fold(dense) != 1.0:
            reasons.append(
                f"{self.name} {self.fold_reason(dense)}, and a factor in the embedding table would not reach images"
            )
        return [*reasons, *class_refusals(dense.whole, self.name)]

    def layout_refusals(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """Return the reasons why it cannot hold these sizes, beyond those that its attributes state."""
        return []

    def inside(self, whole: str) -> Target:
        """Return the target as the text model of a model of images and text: ``whole`` is the parent's ``model_type``."""
        return self

    def only_experts(self, dense: DenseSpec) -> int | None:
        """Return the only number of experts that it can hold of this source; None if there is no such limit."""
        return dense.num_heads // dense.num_kv_heads if self.attention_experts else None

    def majors(self, dense: DenseSpec) -> tuple[str, ...]:
        """Return the versions of transformers that load the result: ``("4.57", "5")`` or ``("5",)``."""
        return ("5",) if self.only_five or self.needs_five & set(source_features(dense)) else ("4.57", "5")

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """Return warnings about runtimes other than transformers."""
        return []

    def head_notes(self, dense: DenseSpec) -> list[str]:
        """Return the cost of writing out a tied head, if it is written (see `unties`)."""
        if not (self.unties and dense.tie_word_embeddings):
            return []
        size = dense.vocab_size * dense.hidden_size
        return [
            f"{self.name} needs a separate output head in several runtimes: the tied head is written out (+{size:,} parameters)"
        ]

    def dense_layer_refusal(self, dense_layers: tuple[int, ...], num_layers: int) -> str | None:
        """Return the reason why these layers cannot stay dense, or None."""
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
        """Return the model around the FFNs of a checkpoint of this architecture as the spec of a dense model.

        ``intermediate_size`` is taken from the configuration and is meaningless if all layers are MoE layers.

        Raises:
            CheckpointError: A key is missing or has an impossible value.
        """
        return common(self.name, config, **self.attention_spec(config))

    def unsupported(self, config: Mapping[str, Any]) -> str | None:
        """Return the key of a checkpoint of this architecture whose value llamamoe does not support, in words; else None."""
        return None

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a `DenseSpec` that this architecture spells in its own way."""
        return {}

    # ---- how it is spelled ------------------------------------------------------------------------------------

    @abstractmethod
    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """Return the keys of ``config.json`` that are this architecture's own (see `common_config` for the others)."""

    @abstractmethod
    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """Yield router, experts and shared expert of one layer."""

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """Return the configuration keys that make the only layer of a one-layer model dense or MoE, if any do."""
        return {}

    def attention_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """Yield norms and attention of one layer; by default every canonical tensor under its own name."""
        prefix = f"model.layers.{layer}."
        turned = {"q_proj": dense.num_heads, "k_proj": dense.num_kv_heads} if self.turns_neighbours(dense) else {}
        for name, shape in layer_shapes(dense, layer).items():
            if not name.startswith("mlp."):
                role: Role = "norm" if "norm" in name else "attention"
                heads = turned.get(name.split(".")[-2], 0)
                yield OutTensor(prefix + name, shape, role, Copy(prefix + name, interleave=heads), layer)

    def dense_ffn_tensors(self, dense: DenseSpec, layer: int) -> Iterator[OutTensor]:
        """Yield the FFN of a layer that stays dense."""
        prefix = f"model.layers.{layer}."
        for name, shape in layer_shapes(dense, layer).items():
            if name.startswith("mlp."):
                yield OutTensor(prefix + name, shape, "dense_ffn", Copy(prefix + name), layer)

    def tensors(self, dense: DenseSpec, layout: MoeLayout) -> Iterator[OutTensor]:
        """Yield every tensor of the output, in the order of a forward pass."""
        fold = self.fold(dense)
        table = (dense.vocab_size, dense.hidden_size)
        embed = "model.embed_tokens.weight"
        yield OutTensor(embed, table, "embedding", Copy(embed, scale=fold))
        for layer in range(dense.num_layers):
            yield from self.attention_tensors(dense, layout, layer)
            if layer in layout.dense_layers:
                yield from self.dense_ffn_tensors(dense, layer)
            else:
                yield from self.moe_tensors(dense, layout, layer)
        norm = Copy("model.norm.weight", self.norm_scale(dense))
        yield OutTensor("model.norm.weight", (dense.hidden_size,), "norm", norm)
        if not self.ties(dense):
            yield OutTensor(
                "lm_head.weight", table, "head", Copy(embed if dense.tie_word_embeddings else "lm_head.weight")
            )

    def fold(self, dense: DenseSpec) -> float:
        """Return the factor baked into the embedding table if the architecture has no ``embedding_multiplier``."""
        return 1.0 if "multipliers" in self.holds else dense.embedding_multiplier

    def fold_reason(self, dense: DenseSpec) -> str:
        """Return why there is such a factor."""
        return "has no embedding multiplier"

    def residual_scale(self, dense: DenseSpec) -> float:
        """Return the factor by which the residual stream, and thus every output of attention and FFN, is larger."""
        return 1.0

    def norm_scale(self, dense: DenseSpec) -> float:
        """Return the factor of the final norm's weight."""
        return 1.0

    def ties(self, dense: DenseSpec) -> bool:
        """Return whether the output's head is tied to its embedding."""
        return dense.tie_word_embeddings and not self.unties and self.fold(dense) == 1.0

    def turns_neighbours(self, dense: DenseSpec) -> bool:
        """Return whether rotary positions turn neighbouring rows of queries and keys, not the two halves of each head."""
        return False

    def stub_width(self, layout_width: int) -> int:
        """Return the width of the zero shared expert written when there are no shared neurons; 0 if none is needed."""
        return 0

    @classmethod
    def router_weighting(cls, weighting: Weighting) -> RouterWeighting:
        """Return its router's normalisation under a weighting: renormalised sigmoids if supported, else softmax."""
        return "sigmoid_renormalised" if weighting == "renormalised" and "sigmoid" in cls.weightings else weighting

    def combine(self, rescale: Rescale, num_experts: int, top_k: int, copies: int = 1) -> Combine:
        """Choose the router's weighting and the factor so that each selected expert counts ``c`` (see `Rescale`).

        With ``w`` the router's weight of one expert, the factor is ``c / w``. The first weighting for which this does
        not depend on k is taken, so that one file is right at every k; else the first weighting. With ``copies``
        experts for each neuron, N / copies experts are the whole FFN, and all N together count it ``copies`` times.
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
    """Return how many of the (ascending) layers are 0, 1, 2, ... without a gap."""
    return next((i for i, layer in enumerate(layers) if layer != i), len(layers))


def trailing(layers: tuple[int, ...], num_layers: int) -> int:
    """Return how many of the (ascending) layers are the last ones without a gap, without the leading run."""
    rest = layers[leading(layers) :]
    return leading(tuple(num_layers - 1 - layer for layer in reversed(rest)))


def common_config(dense: DenseSpec, target: Target, dtype: str) -> dict[str, Any]:
    """Return the keys that all targets share, with both spellings of rope (transformers 4 reads one, 5 the other)."""
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
    config = {key: value for key, value in config.items() if key not in target.derived}
    if "original_max_position_embeddings" in dense.rope:
        config["original_max_position_embeddings"] = dense.rope["original_max_position_embeddings"]
    return config
