"""Dense families: the meaning of a configuration, and the location of the weights in the files.

A family turns its ``config.json`` into a `DenseSpec` and its tensors into *canonical* ones, which are named as
Llama names them (``model.layers.0.mlp.gate_proj.weight``): targets refer only to those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import CheckpointError
from .fields import Fields

if TYPE_CHECKING:
    from ...lazy import torch
    from .linear_attention import LinearAttention

DEFAULT_THETA = 10000.0
"""The rope base that transformers assumes for most families when the configuration names none."""
QkNorm = Literal["", "heads", "turned", "whole", "each"]
"""Norms on queries and keys: none; RMSNorms on each head before or after rotary positions, or on all heads together; a
LayerNorm on each head with weights of its own."""
Op = tuple[str, float]
"""A change of values on reading: ``("add", 1.0)`` or ``("mul", 45.25)``, done in float32."""


@dataclass(frozen=True)
class Read:
    """The origin of a canonical tensor: the tensor ``name``, rows ``start:stop`` of it, then ``ops``.

    ``paired`` re-orders the rows of that many heads from neighbouring rotary pairs to Llama's two halves, the first rows of
    each head, of which ``turned`` is the share.
    """

    name: str
    rows: tuple[int, int] | None = None
    ops: tuple[Op, ...] = ()
    paired: int = 0
    turned: float = 1.0


@dataclass(frozen=True)
class DenseSpec:
    """A dense decoder with SwiGLU-like FFNs, described without regard to its family.

    ``sliding`` holds, per layer, the attention window or None for full attention. ``rope`` is transformers 5's
    ``rope_parameters``; ``no_rope`` are the layers without rotary positions. ``attention_multiplier`` None means
    ``head_dim ** -0.5``. ``post_norm`` means that norms follow attention and FFN instead of preceding them, ``parallel``
    that attention and FFN read one norm and are added together, ``layer_norm`` that norms subtract the mean,
    ``zero_centred`` that canonical norms are stored less 1, ``gated_attention`` that queries come with gates of their heads' outputs,
    and ``whole`` is the ``model_type`` of the model of images and text around it, whose other inputs do not come from the
    embedding table.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict[str, Any]
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = ""
    post_norm: bool = False
    parallel: bool = False
    layer_norm: bool = False
    zero_centred: bool = False
    gated_attention: bool = False
    linear: LinearAttention | None = None
    partial_rotary_factor: float = 1.0
    sliding: tuple[int | None, ...] = ()
    no_rope: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    norm_offset: float = 0.0
    whole: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def plain_head_dim(self) -> bool:
        """True if ``head_dim`` equals hidden size / heads."""
        return self.head_dim * self.num_heads == self.hidden_size

    @property
    def window(self) -> int | None:
        """The attention window if every layer has the same one, else None."""
        return self.sliding[0] if self.sliding and len(set(self.sliding)) == 1 else None

    @property
    def mixed_windows(self) -> bool:
        """True if layers differ in their attention window."""
        return len(set(self.sliding)) > 1

    @property
    def ffn_norm(self) -> str:
        """Name, within a layer, of the norm whose output the FFN reads; meaningless if norms follow the FFN."""
        return "input_layernorm.weight" if self.parallel else "post_attention_layernorm.weight"

    @property
    def turns_in_windows(self) -> bool:
        """True if layers with an attention window have rotary positions, and all others have none."""
        return self.no_rope == tuple(layer for layer, window in enumerate(self.sliding) if window is None)

    @property
    def layer_types(self) -> list[str]:
        """The kind of attention of each layer, as transformers spells it."""
        linear = self.linear.layers if self.linear else ()
        kinds = ["full_attention" if window is None else "sliding_attention" for window in self.sliding]
        return ["linear_attention" if layer in linear else kind for layer, kind in enumerate(kinds)]

    def norm_weight(self, stored_H: torch.Tensor) -> torch.Tensor:
        """Return the factors that a canonical norm multiplies by, ``[H]``."""
        return stored_H.float() + 1.0 if self.zero_centred else stored_H


class Source(ABC):
    """A dense family.

    Attributes:
        name: Its ``model_type``.
        summary: One line for ``llamamoe methods``.
        reference: A publication on the family.
        fields: The keys of its configuration class in transformers with type and default, which hold for keys that
            ``config.json`` leaves out; without them no key is completed.
        only_five: Whether transformers 4.57 does not have it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    fields: ClassVar[Fields] = {}
    only_five: ClassVar[bool] = False

    @abstractmethod
    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """Read the configuration.

        Raises:
            CheckpointError: A key is missing or has an impossible value.
        """

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """Return how each canonical tensor is read from the source's tensors."""
        return {name: Read(name) for name in canonical_shapes(spec)}

    def raw_shapes(self, spec: DenseSpec) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that the files must hold."""
        return canonical_shapes(spec)


def canonical_shapes(spec: DenseSpec) -> dict[str, tuple[int, ...]]:
    """Return every canonical tensor with its shape, in the order of a forward pass, without a tied head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(spec, layer).items()}
    shapes["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_shapes(spec: DenseSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the canonical tensors of one layer, without the prefix ``model.layers.N.``."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {} if spec.post_norm else {"input_layernorm.weight": (hidden,)}
    linear = spec.linear is not None and layer in spec.linear.layers
    shapes |= spec.linear.shapes(hidden) if spec.linear is not None and linear else _attention_shapes(spec)
    if not spec.parallel:
        shapes["post_attention_layernorm.weight"] = (hidden,)
    width = spec.intermediate_size
    for name, rows, columns in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        shapes[f"mlp.{name}.weight"] = (rows, columns)
        if spec.mlp_bias:
            shapes[f"mlp.{name}.bias"] = (rows,)
    if spec.post_norm:
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes


def _attention_shapes(spec: DenseSpec) -> dict[str, tuple[int, ...]]:
    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q_proj", 2 * q if spec.gated_attention else q), ("k_proj", kv), ("v_proj", kv)):
        shapes[f"self_attn.{name}.weight"] = (rows, hidden)
        if spec.qkv_bias:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (hidden, q)
    if spec.o_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if spec.qk_norm:
        each = spec.qk_norm == "each"
        widths = [(n, spec.head_dim) if each else (spec.head_dim,) for n in (spec.num_heads, spec.num_kv_heads)]
        if spec.qk_norm == "whole":
            widths = [(q,), (kv,)]
        names = ("query_layernorm", "key_layernorm") if spec.qk_norm == "turned" else ("q_norm", "k_norm")
        shapes |= {f"self_attn.{name}.weight": width for name, width in zip(names, widths, strict=True)}
    return shapes


def paired_reads(spec: DenseSpec) -> dict[str, Read]:
    """Return how canonical tensors are read under their own names from rotary pairs of neighbouring rows."""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    return {name: Read(name, paired=heads.get(name.split(".")[-2], 0)) for name in canonical_shapes(spec)}


def fused_shapes(spec: DenseSpec, reads: Mapping[str, Read]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor from which canonical ones are read, some of them as rows of one."""
    raw: dict[str, tuple[int, ...]] = {}
    for name, shape in canonical_shapes(spec).items():
        stored = reads[name].name
        raw[stored] = (raw.get(stored, (0,))[0] + shape[0], *shape[1:])
    return raw


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return the value of a key, which must be a whole number above zero.

    Raises:
        CheckpointError: The key is missing without a default, or its value is anything else.
    """
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} = {value!r}, but it must be a whole number above 0.")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return the value of a key, which must be a finite number.

    Raises:
        CheckpointError: The value is anything else.
    """
    value = config.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise CheckpointError(f"config.json: {key} = {value!r}, but it must be a finite number.")
    return float(value)


def rope_parameters(
    config: Mapping[str, Any], theta: float = DEFAULT_THETA, *, with_images: bool = False
) -> dict[str, Any]:
    """Return rope as transformers 5 spells it, from either spelling (a non-null ``rope_scaling`` takes precedence).

    Args:
        config: ``config.json``.
        theta: The base if the configuration names none.
        with_images: Keep the sections of positions of images; those of text are equal in all sections.

    Raises:
        CheckpointError: The value is not a mapping, or holds one set per layer type.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise CheckpointError(
            f"config.json: rope parameters {given!r} are not one flat mapping; they cannot be carried over."
        )
    rope = {k: v for k, v in given.items() if k != "type"}
    rope.setdefault("rope_type", given.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", theta))
    if rope["rope_theta"] is None:
        raise CheckpointError("config.json: rope_theta = None, but it must be a finite number above 0.")
    if rope.get("mrope_section") and not with_images:
        raise CheckpointError(
            "config.json: multimodal rope (mrope_section) belongs to a vision model, not to a dense text model."
        )
    return rope


def named_head_dim(config: Mapping[str, Any]) -> int:
    """Return ``head_dim``, for families whose class in transformers does not derive it from other sizes.

    Raises:
        CheckpointError: It is missing, so that transformers cannot run the model.
    """
    if config.get("head_dim") is None:
        raise CheckpointError(
            "config.json: head_dim is missing, and transformers cannot run this family without it.",
            hint="Set it to hidden_size / num_attention_heads.",
        )
    return positive(config, "head_dim")


def common(family: str, config: Mapping[str, Any], **known: Any) -> DenseSpec:
    """Return the `DenseSpec` of a Llama-like family from the common keys; ``known`` overrides or adds."""
    heads = positive(config, "num_attention_heads")
    hidden = positive(config, "hidden_size")
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": positive(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": positive(config, "intermediate_size"),
        "num_layers": positive(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": positive(config, "num_key_value_heads", heads),
        "head_dim": positive(config, "head_dim", max(hidden // heads, 1)),
        "max_position_embeddings": positive(config, "max_position_embeddings", 2048),
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6),
        "rope": known.get("rope") or rope_parameters(config),
        "hidden_act": config.get("hidden_act", "silu"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "partial_rotary_factor": 1.0,
        "extra": {
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config.get("eos_token_id"),
            "pad_token_id": config.get("pad_token_id"),
            "initializer_range": number(config, "initializer_range", 0.02),
            "attention_dropout": number(config, "attention_dropout", 0.0),
        },
    }
    values |= known
    values.setdefault("sliding", (None,) * values["num_layers"])
    if values["num_heads"] % values["num_kv_heads"]:
        raise CheckpointError(
            f"config.json: num_attention_heads = {heads} do not divide among num_key_value_heads = "
            f"{values['num_kv_heads']}: each key/value head serves equally many heads."
        )
    return DenseSpec(**values)


def windows_by_type(config: Mapping[str, Any], num_layers: int, default_window: int | None) -> tuple[int | None, ...]:
    """Return the windows of the Qwen families by layer: ``layer_types``, else sliding from ``max_window_layers`` on."""
    window = config.get("sliding_window", default_window) if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = [
            "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(num_layers)
        ]
    if len(types) != num_layers or set(types) - {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"config.json: layer_types must name full_attention or sliding_attention for each of {num_layers} layers."
        )
    if window is None and "sliding_attention" in types:
        raise CheckpointError(
            "config.json: layer_types names sliding_attention, but use_sliding_window is false or sliding_window null: "
            "transformers cannot run it."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def types_by_interval(config: Mapping[str, Any], key: str, other: str, num_layers: int) -> list[str]:
    """Return the kind of each layer where only the distance of those with full attention is given.

    Args:
        config: ``config.json``.
        key: The key of that distance, 4 if it is left out.
        other: The kind of the other layers.
        num_layers: Number of layers.

    Raises:
        CheckpointError: The distance is 0 or not a whole number.
    """
    interval = config.get(key, 4)
    if not isinstance(interval, int) or not interval:
        raise CheckpointError(f"config.json: {key} = {interval!r}, but it must be a whole number, not 0.")
    return [other if (layer + 1) % interval else "full_attention" for layer in range(num_layers)]
