"""The keys of transformers' configuration class of a dense family, with type and default of each.

A key that ``config.json`` leaves out has the default of the class, and a value of a type that the class refuses gives a
checkpoint that transformers cannot load. Importing these classes imports torch, so they are mirrored here as tables;
tests compare the tables with transformers' own.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_origin


class Field(NamedTuple):
    """One key: its type, as the class annotates it, and its default."""

    kind: Any
    default: Any


Fields = Mapping[str, Field]
"""Fields by key."""

NUMBER = float | int
TOKEN = int | None
TOKENS = int | list[int] | None

BASE: Fields = {
    "transformers_version": Field(object, None),
    "architectures": Field(object, None),
    "output_hidden_states": Field(object, False),
    "return_dict": Field(object, True),
    "dtype": Field(object, None),
    "chunk_size_feed_forward": Field(object, 0),
    "is_encoder_decoder": Field(object, False),
    "id2label": Field(dict | None, None),
    "label2id": Field(object, None),
    "problem_type": Field(object, None),
}
"""The keys of every class of transformers, which does not check their types (it reads ``id2label`` as a mapping)."""

DECODER: Fields = {
    **BASE,
    "num_key_value_heads": Field(int | None, None),
    "hidden_act": Field(str, "silu"),
    "initializer_range": Field(float, 0.02),
    "rms_norm_eps": Field(float, 1e-6),
    "use_cache": Field(bool, True),
    "tie_word_embeddings": Field(bool, False),
    "rope_parameters": Field(dict | None, None),
    "attention_dropout": Field(NUMBER, 0.0),
    "bos_token_id": Field(TOKEN, 1),
    "eos_token_id": Field(TOKENS, 2),
    "pad_token_id": Field(TOKEN, None),
}
"""The keys that the decoder families share, with the type and the default that most of them have."""


def sizes(
    vocab_size: int, hidden_size: int, intermediate_size: int, layers: int, heads: int, positions: int
) -> dict[str, Field]:
    """Return the fields of the sizes, which every class types as ``int``."""
    defaults = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }
    return {key: Field(int, default) for key, default in defaults.items()}


QWEN: Fields = {
    **DECODER,
    **sizes(151936, 4096, 22016, layers=32, heads=32, positions=32768),
    "num_key_value_heads": Field(int | None, 32),
    "use_sliding_window": Field(bool, False),
    "sliding_window": Field(int | None, 4096),
    "max_window_layers": Field(int, 28),
    "layer_types": Field(list[str] | None, None),
    "bos_token_id": Field(TOKEN, None),
    "eos_token_id": Field(TOKENS, None),
}
"""The keys of Qwen2; Qwen3 extends them."""


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value out of JSON has a type, by the rules of transformers' strict classes.

    They differ from ``isinstance`` for ``int``, which excludes ``bool``; ``float`` excludes whole numbers.
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(each, get_args(kind)[0]) for each in value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def described(kind: Any) -> str:
    """Return a type as a phrase for messages."""
    if isinstance(kind, types.UnionType):
        return " or ".join(described(each) for each in get_args(kind))
    if get_origin(kind) is list:
        return f"a list ({described(get_args(kind)[0])} each)"
    names = {int: "a whole number", float: "a number with a decimal point", bool: "true or false", str: "a name",
             type(None): "null", dict: "a mapping"}  # fmt: skip
    return names[kind]


def completed(config: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the configuration with the default of the class for each key that is missing."""
    return {key: field.default for key, field in fields.items()} | dict(config)
