"""The tables of configuration keys are those of transformers' own classes, value by value."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from llamamoe.architectures.config_values import check_rope, check_special, check_values
from llamamoe.architectures.sources import SOURCES
from llamamoe.architectures.sources.fields import completed, fits
from llamamoe.errors import CheckpointError
from tests.dense import COMMON, VARIANTS

FAMILIES = SOURCES.names()
PROBES: tuple[Any, ...] = (
    None, True, False, 0, 1, 7, 64, -1, 10**9, 2**31, 0.0, 0.5, 1.0, -1.0, 1e300, "", "x", "float32", "silu", "gelu",
    "1", [], [1], [1, 2, 3], ["x"], [None], [True], [1.5], [[]], {}, {"a": 1}, {"a": "b"}, {"0": "b"}, {"a": None},
    ["full_attention", "full_attention"], ["sliding_attention"], "regression",
)  # fmt: skip
OTHER = ("torch_dtype", "num_labels", "head_dim", "layer_types", "use_return_dict", "sub_configs", "is_heterogeneous")
NEEDED = {"ministral": {"head_dim": 16}, "hunyuan_v1_dense": {"head_dim": 16}}
"""Keys without which transformers cannot run a family although its class has a default."""
NARROWER = {
    "vocab_size": "sizes are above 0", "hidden_size": "sizes are above 0", "intermediate_size": "sizes are above 0",
    "num_hidden_layers": "sizes are above 0", "num_attention_heads": "sizes are above 0",
    "num_key_value_heads": "sizes are above 0, and heads divide among them", "head_dim": "sizes are above 0",
    "max_position_embeddings": "sizes are above 0", "original_max_position_embeddings": "sizes are above 0",
    "sliding_window": "a window is not negative", "max_window_layers": "not negative",
    "rms_norm_eps": "finite and not negative", "layer_norm_eps": "finite and not negative",
    "logit_scale": "finite and above 0",
    "linear_conv_kernel_dim": "sizes are above 0", "linear_key_head_dim": "sizes are above 0",
    "linear_value_head_dim": "sizes are above 0", "linear_num_key_heads": "sizes are above 0, and heads divide among them",
    "linear_num_value_heads": "sizes are above 0, and divide among those of keys", "initializer_range": "finite and not negative",
    "attention_dropout": "a share", "resid_pdrop": "a share", "embd_pdrop": "a share", "residual_dropout": "a share",
    "pad_token_id": "the embedding must have its row",
    "rope_parameters": "must be flat rope parameters", "layer_types": "of attention, and only of some families",
    "no_rope_layers": "one for each layer", "no_rope_layer_interval": "not 0",
    "attention_bias": "", "use_bidirectional_attention": "every target is causal", "dtype": "a floating dtype",
    "torch_dtype": "a floating dtype", "num_labels": "a bound on memory",
    "sub_configs": "means nothing there", "is_heterogeneous": "means nothing there",
}  # fmt: skip
"""Keys of which we refuse values that the class accepts, and why."""


def ours(family: str, config: dict[str, Any]) -> str | None:
    """Return why the plan refuses a configuration, or None."""
    source = SOURCES.get(family)()
    try:
        check_values(config, source.fields)
        spec = source.spec(completed(config, source.fields))
        check_rope(spec)
        check_special(spec)
    except CheckpointError as error:
        return error.message
    return None


def theirs(family: str, config: dict[str, Any]) -> str | None:
    try:
        CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_the_default_of_the_class(family: str) -> None:
    found = {each.name: each.default for each in dataclasses.fields(CONFIG_MAPPING[family])}
    assert {key: field.default for key, field in SOURCES.get(family).fields.items()} == found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_is_that_of_the_class(family: str) -> None:
    from huggingface_hub.dataclasses import type_validator

    wrong = []
    for each in dataclasses.fields(CONFIG_MAPPING[family]):
        if isinstance(each.type, str):
            continue  # the annotations of the base class are text, which is not checked
        for value in PROBES:
            try:
                type_validator(each.name, value, each.type)
                accepted = True
            except TypeError:
                accepted = False
            if fits(value, SOURCES.get(family).fields[each.name].kind) != accepted:
                wrong.append((each.name, value, accepted))
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_that_the_class_refuses_is_refused_by_name(family: str) -> None:
    base = {**COMMON, **NEEDED.get(family, {}), "model_type": family}
    keys = dict.fromkeys([*SOURCES.get(family).fields, *OTHER])
    silent, narrower, unnamed = [], [], []
    for key in keys:
        for value in PROBES:
            if key in ("num_labels", "num_hidden_layers") and value in (10**9, 2**31):
                continue  # the class makes a list of that length
            config = {**base, key: value}
            we, they = ours(family, config), theirs(family, config)
            if they is not None and we is None:
                silent.append((key, value, they[:120]))
            elif they is None and we is not None and key not in NARROWER:
                narrower.append((key, value, we))
            if we is not None and key not in we:
                unnamed.append((key, value, we))
    assert not silent, "we accept what the class refuses"
    assert not narrower, "we refuse what the class accepts, without a reason"
    assert not unnamed


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_what_is_left_out_is_as_the_class_has_it(variant: str) -> None:
    """Every key in turn is left out of a saved configuration: what we read equals what the class computes."""
    keys = {**COMMON, **VARIANTS[variant]}
    family = keys["model_type"]
    full = CONFIG_MAPPING[family](**{k: v for k, v in keys.items() if k != "model_type"}).to_dict()
    full = {key: value for key, value in full.items() if value is not None or key != "head_dim"}
    for gone in (None, *full):
        config = {key: value for key, value in full.items() if key not in (gone, "model_type")}
        config["model_type"] = family
        if ours(family, config) is not None:
            assert gone in ("num_attention_heads", "hidden_size", "num_hidden_layers", "pad_token_id", "vocab_size",
                            "num_key_value_heads", "use_sliding_window", "sliding_window",
                            "head_dim", "linear_num_key_heads"), gone  # fmt: skip
            continue
        source = SOURCES.get(family)()
        spec = source.spec(completed(config, source.fields))
        real = CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
        assert spec.rms_norm_eps == (getattr(real, "layer_norm_eps", None) or real.rms_norm_eps), gone
        assert spec.max_position_embeddings == real.max_position_embeddings, gone
        assert spec.tie_word_embeddings == real.tie_word_embeddings, gone
        assert spec.hidden_act == real.hidden_act, gone
        assert (spec.num_heads, spec.num_kv_heads) == (real.num_attention_heads, real.num_key_value_heads), gone
        assert spec.head_dim == (getattr(real, "head_dim", None) or real.hidden_size // real.num_attention_heads), gone
        assert {k: v for k, v in real.rope_parameters.items() if k != "partial_rotary_factor"} == {
            k: v for k, v in spec.rope.items() if k != "partial_rotary_factor"}, gone  # fmt: skip
        assert spec.partial_rotary_factor == real.rope_parameters.get("partial_rotary_factor", 1.0), gone
        assert spec.extra["bos_token_id"] == real.bos_token_id, gone
        assert spec.extra["eos_token_id"] == real.eos_token_id, gone
        assert spec.extra["pad_token_id"] == real.pad_token_id, gone
        for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
            if family == "granite":
                assert getattr(spec, key) == getattr(real, key), gone
