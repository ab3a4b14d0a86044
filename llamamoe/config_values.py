"""Values in a dense model's ``config.json`` that no model can have, refused by name before anything relies on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .errors import CheckpointError
from .sources.base import DenseSpec


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


def _not_negative(value: Any) -> bool:
    return _finite(value) and value >= 0


def _token(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


Rule = tuple[str, Callable[[Any], bool], tuple[str, ...]]

_SIZE = "a whole number above 0"
_NUMBER = "a finite number"
_RULES: tuple[Rule, ...] = (
    (
        _SIZE,
        lambda value: _whole(value) and value > 0,
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings"),
    ),
    ("a whole number, not negative", lambda value: _whole(value) and value >= 0, ("sliding_window", "max_window_layers")),
    ("a finite number, not negative", _not_negative, ("rms_norm_eps", "initializer_range", "attention_dropout")),
    ("a finite number above 0", lambda value: _finite(value) and value > 0, ("rope_theta", "partial_rotary_factor")),
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
    ("a name", lambda value: isinstance(value, str), ("hidden_act", "hidden_activation")),
)  # fmt: skip
"""What the values of which keys must be; null means that the key is left out."""

_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "original_max_position_embeddings",
                 "beta_fast", "beta_slow", "rope_theta")  # fmt: skip
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of rope that transformers 4.57 and 5 compute, and what each cannot do without."""


def check_values(config: Mapping[str, Any]) -> None:
    """Check the kind of every value that a dense family reads.

    Raises:
        CheckpointError: One is impossible; key, value and rule are named.
    """
    for phrase, holds, keys in _RULES:
        for key in keys:
            value = config.get(key)
            if value is not None and not holds(value):
                raise CheckpointError(f"config.json: {key} = {value!r}, but it must be {phrase}.", hint=_HINT)
    if config.get("use_sliding_window") and "max_window_layers" in config and config["max_window_layers"] is None:
        raise CheckpointError("config.json: max_window_layers = None, but use_sliding_window needs it.", hint=_HINT)
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise CheckpointError(
                f"config.json: {key} = {config[key]!r}, but rope parameters must be a mapping.", hint=_HINT
            )


_HINT = "Download config.json again, or correct it."


def check_rope(spec: DenseSpec) -> None:
    """Check that rope is of a known kind and has all the numbers that it needs.

    Raises:
        CheckpointError: It is not, or has not.
    """
    rope, kind = spec.rope, spec.rope.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        raise CheckpointError(
            f"config.json: rope_type = {kind!r} is none that can be carried over exactly.",
            hint=f"Known: {', '.join(_ROPE_NEEDS)}.",
        )
    missing = [key for key in _ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: rope_type = {kind!r} needs {', '.join(missing)}.", hint=_HINT)
    for key in _ROPE_NUMBERS:
        if rope.get(key) is not None and not (_finite(rope[key]) and rope[key] > 0):
            raise CheckpointError(
                f"config.json: {key} = {rope[key]!r} in the rope parameters, but it must be a finite number above 0.",
                hint=_HINT,
            )
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
