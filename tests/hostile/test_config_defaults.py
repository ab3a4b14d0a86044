"""Configurations that leave keys out: the conversion computes what transformers makes of the parent, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llamamoe
from tests.dense import make_dense

from .conftest import Refused, edit_config, recipe

LEFT_OUT = [
    ("llama", "rms_norm_eps"),
    ("llama", "head_dim"),
    ("llama", "rope_parameters"),
    ("gemma", "rms_norm_eps"),
    ("gemma", "hidden_act"),
    ("granite", "rms_norm_eps"),
    ("granite", "attention_multiplier"),
    ("mistral-window", "sliding_window"),
    ("qwen2-windows", "layer_types"),
    ("qwen3", "rms_norm_eps"),
    ("phi3-window", "rms_norm_eps"),
    ("phi3-partial", "rms_norm_eps"),
    ("phi3-longrope", "rms_norm_eps"),
    ("phi3-longrope", "max_position_embeddings"),
    ("phi3-longrope", "original_max_position_embeddings"),
]


def logits(folder: Path, **keys: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **keys).eval()
    ids = torch.arange(3, 51)[None] * 5 % 120 + 3  # longer than the windows and than the original context of longrope
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name or ".router." in name:  # equal weights, for which the conversion is exact
                parameter.zero_()
        return model(ids).logits


@pytest.mark.parametrize(("variant", "key"), LEFT_OUT)
def test_the_output_computes_what_transformers_makes_of_the_parent(tmp_path: Path, variant: str, key: str) -> None:
    source, out = make_dense(tmp_path / "dense", variant), tmp_path / "out"
    edit_config(source, lambda config: config.pop(key, None))
    dtype = {"dtype": "float32"} if variant.startswith("gemma") else {}
    llamamoe.split(source, out, recipe(num_experts=4, top_k=4, **dtype), verify=False)
    parent, made = logits(source), logits(out)
    assert (made - parent).abs().max() < 1e-5 * parent.abs().max()


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        ("llama", "initializer_range", 1),
        ("llama", "mlp_bias", None),
        ("llama", "pad_token_id", []),
        ("llama", "pad_token_id", 2**31),
        ("llama", "bos_token_id", [1, 2, 3]),
        ("llama", "hidden_act", ""),
        ("llama", "use_cache", "yes"),
        ("llama", "use_cache", -1000000000),
        ("llama", "hidden_size", None),
        ("llama", "dtype", "float33"),
        ("llama", "rope_theta", None),
        ("llama", "is_causal", False),
        ("llama", "per_layer_config", {"0": {"rms_norm_eps": 1e-3}}),
        ("qwen2", "head_dim", None),
        ("phi3-window", "original_max_position_embeddings", None),
    ],
)
def test_what_transformers_refuses_is_refused_in_the_plan(
    tmp_path: Path, refused: Refused, variant: str, key: str, value: Any
) -> None:
    source = make_dense(tmp_path / "dense", variant)
    edit_config(source, lambda config: config.pop("rope_parameters", None) if key == "rope_theta" else None)
    edit_config(source, **{key: value})
    refused(source, "config.json" if key != "hidden_act" else "hidden_act", key)


def test_a_size_whose_default_disagrees_with_the_weights_is_named(tmp_path: Path, refused: Refused) -> None:
    source = make_dense(tmp_path / "dense")
    edit_config(source, lambda config: config.pop("intermediate_size"))
    refused(source, "config.json leaves out intermediate_size (11008)")
