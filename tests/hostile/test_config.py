"""Hostile configurations: one error that names the key, at once, in little memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest

import llamamoe

from .conftest import Refused, edit_config, recipe


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", '"llama"', "null", "{", "[" * 100_000, '{"a":' * 50_000, '{"vocab_size": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_no_json_object(source: Path, refused: Refused, text: str) -> None:
    (source / "config.json").write_text(text)
    refused(source, "config.json")


def test_no_text(source: Path, refused: Refused) -> None:
    (source / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(source, "config.json", "not valid JSON")


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "head_dim", "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("value", [-1, 0, "64", 64.0, 64.5, [64], {"a": 1}, True, float("nan"), float("inf")])
@pytest.mark.parametrize("key", SIZES)
def test_size_of_a_wrong_kind(source: Path, refused: Refused, key: str, value: Any) -> None:
    edit_config(source, **{key: value})
    refused(source, "config.json", key, repr(value), "whole number above 0")


@pytest.mark.parametrize("value", [10**9, 10**30])
@pytest.mark.parametrize("key", SIZES[:-1])
def test_huge_size_is_refused_at_once(source: Path, refused: Refused, key: str, value: int) -> None:
    edit_config(source, **{key: value})
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(source, "config.json")
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "seed_oss"])
def test_huge_number_of_layers_in_every_family(source: Path, refused: Refused, family: str) -> None:
    edit_config(source, model_type=family, num_hidden_layers=10**9)
    refused(source, "num_hidden_layers = 1000000000", "config and weights disagree")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_missing_size(source: Path, refused: Refused, key: str) -> None:
    edit_config(source, lambda config: config.pop(key))
    refused(source, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 10**400),
        ("initializer_range", float("inf")),
        ("attention_dropout", "x"),
        ("hidden_act", "sillu"),
        ("hidden_act", ["silu"]),
        ("hidden_act", None),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 2),
        ("attention_bias", "no"),
        ("mlp_bias", "no"),
        ("eos_token_id", "x"),
        ("eos_token_id", [2, "x"]),
        ("eos_token_id", {"a": 1}),
        ("bos_token_id", 1.5),
        ("pad_token_id", [[]]),
        ("num_key_value_heads", 3),
        ("quantization_config", [1]),
    ],
)
def test_value_of_a_wrong_kind(source: Path, refused: Refused, key: str, value: Any) -> None:
    edit_config(source, **{key: value})
    refused(
        source,
        "quantised" if key.startswith("quant") else key,
    )


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**59])
@pytest.mark.parametrize(
    "keys",
    ["sliding_window", "max_position_embeddings", "eos_token_id", "chunk_size_feed_forward", "resid_pdrop", "other"],
)
def test_whole_numbers_beyond_64_bits(source: Path, refused: Refused, keys: str, value: int) -> None:
    edit_config(source, **{keys: [value] if keys == "eos_token_id" else value})
    refused(source, f"config.json: {keys}", f"{value}", "between -2**63 and 2**63")


def test_the_largest_whole_numbers_are_carried_over(source: Path) -> None:
    edit_config(source, max_position_embeddings=2**63 - 1, tokenizer_model_max_length=10**30)
    assert llamamoe.plan_conversion(source, recipe()).config["max_position_embeddings"] == 2**63 - 1


@pytest.mark.parametrize("key", ["attention_dropout", "resid_pdrop", "embd_pdrop"])
@pytest.mark.parametrize("value", [1.5, -0.1, 1e300, "x"])
def test_dropout_is_a_share(source: Path, refused: Refused, key: str, value: Any) -> None:
    edit_config(source, model_type="phi3", **{key: value})
    refused(source, f"{key} = {value!r}", "from 0 to 1")


@pytest.mark.parametrize("value", [2, [2, 3], None, []])
def test_end_tokens_may_be_several(source: Path, value: Any) -> None:
    edit_config(source, eos_token_id=value)
    assert llamamoe.plan_conversion(source, recipe()).config["eos_token_id"] == value


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        ({"rope_type": "spiral", "factor": 2.0}, "'spiral'"),
        ({"type": "spiral"}, "'spiral'"),
        ({"rope_type": ["linear"], "factor": 2.0}, "rope_type"),
        ({"rope_type": None}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "dynamic", "factor": float("nan")}, "factor"),
        ({"rope_type": "yarn"}, "factor"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor"),
        ({k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}, "original_max_position_embeddings"),
        ({**LLAMA3, "original_max_position_embeddings": "32"}, "original_max_position_embeddings"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "long_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": "x"}, "long_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 8}, "short_factor"),
        ("linear", "'linear'"),
        ([1], "[1]"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_garbage(source: Path, refused: Refused, key: str, rope: Any, word: str) -> None:
    def change(config: dict[str, Any]) -> None:
        config.pop("rope_parameters", None)
        config.pop("rope_scaling", None)
        config["rope_theta"] = 10000.0
        config[key] = rope

    edit_config(source, change)
    refused(source, "config.json", word)


@pytest.mark.parametrize("theta", ["10000", -1.0, float("nan"), [1], float("inf")])
@pytest.mark.parametrize("nested", [True, False])
def test_rope_theta(source: Path, refused: Refused, theta: Any, nested: bool) -> None:
    def change(config: dict[str, Any]) -> None:
        config.pop("rope_parameters", None)
        config |= (
            {"rope_parameters": {"rope_type": "default", "rope_theta": theta}} if nested else {"rope_theta": theta}
        )

    edit_config(source, change)
    refused(source, "rope_theta", repr(theta))


@pytest.mark.parametrize(
    ("family", "keys", "word"),
    [
        ("mistral", {"sliding_window": "x"}, "sliding_window"),
        ("mistral", {"sliding_window": -4}, "sliding_window"),
        ("phi3", {"sliding_window": [1]}, "sliding_window"),
        ("phi3", {"num_hidden_layers": "2"}, "num_hidden_layers"),
        ("phi3", {"rope_parameters": [1]}, "rope"),
        ("phi3", {"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers"),
        ("qwen2", {"layer_types": 5}, "layer_types"),
        ("qwen2", {"layer_types": [["a"], 1]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        (
            "qwen3",
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": None,
            },
            "sliding_window",
        ),
        ("granite", {"embedding_multiplier": "x"}, "embedding_multiplier"),
        ("granite", {"logits_scaling": float("nan")}, "logits_scaling"),
        ("seed_oss", {"residual_dropout": 1.5}, "residual_dropout"),
        ("seed_oss", {"attention_out_bias": 1}, "attention_out_bias"),
    ],
)
def test_keys_of_other_families(source: Path, refused: Refused, family: str, keys: dict[str, Any], word: str) -> None:
    edit_config(source, model_type=family, **keys)
    refused(source, word)
