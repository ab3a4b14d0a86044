"""The static control: a dense model of the parent's architecture that computes what the kept neurons compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.conversion.layer import convert_layer
from tests.dense import VARIANTS, make_dense

IDS = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(1))
FAMILIES = {"phi3-window": "mistral", "phi3-longrope": "mistral", "gemma": "llama"}
FAMILIES |= {"ernie4_5": "llama", "ernie4_5-head-dim": "llama", "internlm3": "llama"}
"""Families that are written as another one."""
REFUSED = {"phi3-partial": "mistral", "glm": "llama", "glm-no-bias": "llama"}
"""Variants that no dense architecture here holds, with the one that the refusal names."""


def recipe(**given: Any) -> llamamoe.SplitRecipe:
    return llamamoe.load_recipe(given={"method": "static", "shared": 0.5, "shared_by": "weight_norm", **given})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def pruned(source: Path, omitted: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the parent in its own class, with the down projections of the omitted neurons set to zero."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for layer, index in zip(model.model.layers, omitted, strict=True):
        layer.mlp.down_proj.weight.data[:, index] = 0
    return logits(model)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in REFUSED])
def test_it_is_the_parent_without_the_omitted_neurons(tmp_path: Path, variant: str) -> None:
    source = make_dense(tmp_path / "dense", variant)
    result = llamamoe.split(source, tmp_path / "out", recipe(), verify=False)
    config = json.loads((result.out / "config.json").read_text())
    assert config["model_type"] == FAMILIES.get(variant, VARIANTS[variant]["model_type"])
    assert config["intermediate_size"] == 86
    model, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == config["architectures"][0]
    omitted = [torch.from_numpy(convert_layer(result.plan, i).parts.partition.omitted) for i in range(2)]
    assert [len(o) for o in omitted] == [86, 86]
    want = pruned(source, omitted)
    assert float((logits(model) - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("variant", REFUSED)
def test_what_no_dense_architecture_holds_is_refused(tmp_path: Path, variant: str) -> None:
    source = make_dense(tmp_path / "dense", variant)
    said = f"{REFUSED[variant]} cannot hold rotary positions on a part of each head"
    with pytest.raises(llamamoe.RefusedError, match=said):
        llamamoe.plan_conversion(source, recipe())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"shared": 0}, "keeps the shared neurons only"),
        ({"shared": 172}, "nothing is left to leave out"),
        ({"shared": "1x"}, "counts expert widths"),
        ({"keep_dense": [0]}, "one intermediate_size"),
        ({"target": "mixtral"}, "mixtral holds experts, which this method does not make"),
        ({"method": "random", "target": "dense"}, "dense holds no experts"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    source = make_dense(tmp_path / "dense")
    with pytest.raises(llamamoe.RefusedError, match=reason):
        llamamoe.plan_conversion(source, recipe(**given))


def test_numbers_of_experts_mean_nothing(tmp_path: Path) -> None:
    """The files are the same, and the plan says why."""
    source = make_dense(tmp_path / "dense", num_hidden_layers=1)
    plans = [llamamoe.plan_conversion(source, recipe(num_experts=n, top_k=k)) for n, k in ((8, 2), (3, 3))]
    assert plans[0].tensors == plans[1].tensors
    assert plans[0].config == plans[1].config
    assert any("numbers of experts" in advice for advice in plans[0].advice)
    assert plans[0].cost.active["dense_ffn"] * 2 == plans[0].parent_cost.active["dense_ffn"]
    assert plans[0].padding_per_layer == 0


def test_verification_holds_the_file_to_what_was_kept(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", num_hidden_layers=1)
    receipt = llamamoe.split(source, tmp_path / "out", recipe()).receipt["verification"]
    assert receipt["passed"]
    assert (receipt["equal_weights"], receipt["all_experts"], receipt["kept"]) == (None, None, "neurons")
    assert receipt["neurons_checked"] == 1
    assert 0 < receipt["as_configured"] < 10
