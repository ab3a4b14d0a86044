"""Values in a model's ``config.json`` that no model can have, refused by name before anything relies on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from .sources.base import DenseSpec
from .sources.fields import Fields, described, fits
from .sources.linear_attention import LINEAR_KEYS


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def _not_negative(value: Any) -> bool:
    return _finite(value) and value >= 0


def _positive(value: Any) -> bool:
    return _finite(value) and value > 0


def _token(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


Rule = tuple[str, Callable[[Any], bool], tuple[str, ...]]

SIZE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads",
)  # fmt: skip
"""The keys that shape the tensors."""
_SIZE = "a whole number above 0"
_NUMBER = "a finite number"
_RULES: tuple[Rule, ...] = (
    (
        _SIZE,
        lambda value: _whole(value) and value > 0,
        (*SIZE_KEYS, *LINEAR_KEYS, "max_position_embeddings", "original_max_position_embeddings"),
    ),
    ("a whole number, not negative", lambda value: _whole(value) and value >= 0, ("sliding_window", "max_window_layers")),
    ("a finite number, not negative", _not_negative, ("rms_norm_eps", "layer_norm_eps", "initializer_range")),
    (
        "a number from 0 to 1",
        lambda value: _not_negative(value) and value <= 1,
        ("attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout"),
    ),
    ("a finite number above 0", _positive, ("rope_theta", "partial_rotary_factor", "routed_scaling_factor", "logit_scale")),
    (
        _NUMBER,
        _finite,
        ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"),
    ),
    ("a token id or a list of them", _token, ("bos_token_id", "eos_token_id", "pad_token_id")),
    (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
        ("layer_types",),
    ),
    ("a mapping", lambda value: isinstance(value, Mapping), ("id2label",)),
    ("a name", lambda value: isinstance(value, str), ("hidden_act", "hidden_activation")),
)  # fmt: skip
"""The rule, its check and the keys that it holds for; null means that the key is left out."""
_RULE_OF = {key: (phrase, holds) for phrase, holds, keys in _RULES for key in keys}

_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "original_max_position_embeddings",
                 "beta_fast", "beta_slow", "rope_theta", "partial_rotary_factor", "alpha")  # fmt: skip
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of rope that transformers 4.57 and 5 compute, with the keys that each requires."""


_DTYPES = ("float32", "float", "float64", "double", "float16", "half", "bfloat16")
_ATTENTION = ("full_attention", "sliding_attention")
_HYBRID = ("full_attention", "linear_attention")
MOST_LABELS = 1_000_000
"""Upper limit of ``num_labels``, because transformers creates a name for each label."""
_READ_ONLY = ("use_return_dict", "is_heterogeneous", "per_layer_attributes", "sub_configs",
              "allow_global_per_layer_attribute_access")  # fmt: skip
"""Attributes of transformers' configuration that no key can set."""


def check_value(config: Mapping[str, Any], key: str) -> None:
    """Check the value of one key of the rules above; null and a missing value are valid.

    Raises:
        CheckpointError: The value is invalid; the message names key, value and rule.
    """
    value, (phrase, holds) = config.get(key), _RULE_OF[key]
    if value is not None and not holds(value):
        raise CheckpointError(f"config.json: {key} = {value!r}, but it must be {phrase}.", hint=_HINT)


def check_values(config: Mapping[str, Any], fields: Fields | None = None) -> None:
    """Check the kind of every value that a dense family or a target reads, and of all that its class in transformers checks.

    Args:
        config: ``config.json``, before defaults are filled in.
        fields: The keys of the class, if it is that of a dense family.

    Raises:
        CheckpointError: A value is invalid, or transformers refuses it; the message names key, value and rule.
    """
    for key in _RULE_OF:
        check_value(config, key)
    if config.get("use_sliding_window") and "max_window_layers" in config and config["max_window_layers"] is None:
        raise CheckpointError("config.json: max_window_layers = None, but use_sliding_window needs it.", hint=_HINT)
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None:
            _check_rope_values(key, config[key])
    _check_class(config, fields or {})
    if fields is not None and (config.get("per_layer_config") or config.get("is_causal", True) is not True):
        key = "per_layer_config" if config.get("per_layer_config") else "is_causal"
        raise CheckpointError(f"config.json: {key} = {config[key]!r}, which no target can compute exactly.")


def _check_rope_values(name: str, rope: Any) -> None:
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"config.json: {name} = {rope!r}, but rope parameters must be a mapping.", hint=_HINT)
    for key in _ROPE_NUMBERS:
        if rope.get(key) is not None and not _positive(rope[key]):
            raise CheckpointError(
                f"config.json: {name}.{key} = {rope[key]!r}, but it must be a finite number above 0.", hint=_HINT
            )


def _check_class(config: Mapping[str, Any], fields: Fields) -> None:
    """Check what the configuration class in transformers refuses."""
    for key, field in fields.items():
        if key in config and not fits(config[key], field.kind):
            raise CheckpointError(
                f"config.json: {key} = {config[key]!r}, but it must be {described(field.kind)}: transformers refuses it.",
                hint=_HINT,
            )
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in _DTYPES:
            raise CheckpointError(
                f"config.json: {key} = {config[key]!r}, but it must be one of {', '.join(_DTYPES)}.", hint=_HINT
            )
    labels = config.get("num_labels", 0)
    if config.get("id2label") is None and not (_whole(labels) and labels <= MOST_LABELS):
        raise CheckpointError(
            f"config.json: num_labels = {labels!r}, but it must be a whole number up to {MOST_LABELS}.", hint=_HINT
        )
    if not all(_is_integer(key) for key in config.get("id2label") or {}):
        raise CheckpointError(f"config.json: id2label = {config['id2label']!r}, but its keys must be whole numbers.")
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    kinds = _HYBRID if LINEAR_KEYS[0] in fields else _ATTENTION
    if fields and types is not None and (set(types) - set(kinds) or (layers is not None and layers != len(types))):
        raise CheckpointError(
            f"config.json: layer_types = {types!r}, but it must name {' or '.join(kinds)} for each of {layers} layers."
        )
    if "head_dim" in config and config["head_dim"] is None and fields and "head_dim" not in fields:
        raise CheckpointError("config.json: head_dim = None, but it must be a whole number above 0 or left out.")
    read_only = next((key for key in _READ_ONLY if key in config), None)
    if read_only:
        raise CheckpointError(f"config.json: {read_only} cannot be set: transformers refuses it.", hint=_HINT)


def _is_integer(text: str) -> bool:
    """Return whether ``int()`` accepts the value."""
    try:
        int(text)
    except ValueError:
        return False
    return True


def check_special(spec: DenseSpec) -> None:
    """Check rules of transformers' classes that involve several values.

    Raises:
        CheckpointError: The values contradict each other, so that transformers cannot load the checkpoint.
    """
    pad = spec.extra.get("pad_token_id")
    if pad is not None and not -spec.vocab_size <= pad < spec.vocab_size:
        raise CheckpointError(
            f"config.json: pad_token_id = {pad!r} must be below vocab_size = {spec.vocab_size}: transformers cannot build "
            "the embedding.",
            hint="Set it to null or to a token of the vocabulary (a missing key has the default of the family).",
        )
    if spec.family in ("llama", "internlm3") and spec.hidden_size % spec.num_heads:
        raise CheckpointError(
            f"config.json: hidden_size = {spec.hidden_size} is not a multiple of num_attention_heads = {spec.num_heads}: "
            "transformers refuses it."
        )
    if spec.family == "llama" and spec.extra["initializer_range"] > 1.0:
        raise CheckpointError(
            f"config.json: initializer_range = {spec.extra['initializer_range']!r} must be at most 1: transformers refuses it."
        )
    if spec.head_dim % 2 and spec.head_dim > 4 and int(spec.head_dim * spec.partial_rotary_factor) == spec.head_dim:
        raise CheckpointError(
            f"config.json: head_dim = {spec.head_dim} must be even, because rotary positions turn pairs."
        )


_HINT = "Download config.json again, or correct it."


def check_rope(spec: DenseSpec) -> None:
    """Check that rope is of a known kind and complete (values are checked by `check_values`).

    Raises:
        CheckpointError: The kind is unknown, or a number is missing.
    """
    rope, kind = spec.rope, spec.rope.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise CheckpointError(
            f"config.json: rope_type = {kind!r} is not one that can be carried over exactly.",
            hint=f"Known: {', '.join(_ROPE_NEEDS)}.",
        )
    missing = [key for key in _ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: rope_type = {kind!r} needs {', '.join(missing)}.", hint=_HINT)
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise CheckpointError(
            f"config.json: high_freq_factor = {rope['high_freq_factor']!r} in the rope parameters must be above "
            f"low_freq_factor = {rope['low_freq_factor']!r}.",
            hint=_HINT,
        )
    pairs = int(spec.head_dim * spec.partial_rotary_factor) // 2
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = rope[key]
        if not isinstance(factors, list) or len(factors) != pairs or not all(map(_finite, factors)):
            raise CheckpointError(
                f"config.json: {key} in the rope parameters must be a list of {pairs} finite numbers, half of head_dim.",
                hint=_HINT,
            )
