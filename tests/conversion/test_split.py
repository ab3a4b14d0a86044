"""Warnings and refusals of a conversion beyond its plan: overflow, soft routers, callbacks, receipts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llamamoe
from tests.dense import FFN_TARGETS, make_dense, variant_for


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("conversion") / "dense")


def recipe(**given: Any) -> llamamoe.SplitRecipe:
    return llamamoe.load_recipe(given={"method": "random", "num_experts": 4, **given})


@pytest.mark.parametrize(("value", "scale"), [(1e6, "as it is"), (20000.0, "times the factor")])
@pytest.mark.parametrize("verify", [True, False])
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, value: float, scale: str, verify: bool) -> None:
    folder = make_dense(tmp_path / "dense", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(llamamoe.RefusedError, match="float16 cannot hold") as error:
        llamamoe.split(folder, tmp_path / "out", recipe(dtype="float16"), verify=verify)
    assert "layers.1" in error.value.message
    assert "--dtype bfloat16" in str(error.value)
    assert not (tmp_path / "out").exists()
    llamamoe.split(folder, tmp_path / "out", recipe(dtype="bfloat16"), verify=verify, force=True)


def test_a_parent_that_is_not_finite_is_converted_and_said(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = llamamoe.split(folder, tmp_path / "out", recipe())
    assert any("NaN or infinite" in w and "layer.0" in w for w in result.warnings)
    assert result.receipt["verification"]["passed"] is False
    assert "not finite" in result.receipt["verification"]["note"]
    assert result.receipt["verification"]["neurons_checked"] == 2
    with pytest.raises(llamamoe.VerificationError, match="not finite"):
        llamamoe.verify(result.out, folder)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "exact with all experts selected"),
        ({"router_scale": "soft"}, "if the soft router's rows are set to zero"),
        ({"rescale": "llama_moe"}, "if the sum of the experts is multiplied by 2"),
        ({"rescale": "unit", "target": "mixtral"}, "if the sum of the experts is multiplied by 2 (4/2)"),
        ({"rescale": "unit", "target": "qwen2_moe"}, "exact with all experts selected"),
    ],
)
def test_plan_card_and_config_say_on_which_condition_it_is_exact(
    source: Path, tmp_path: Path, given: dict[str, Any], sentence: str
) -> None:
    result = llamamoe.split(source, tmp_path / "out", recipe(**given))
    config = json.loads((result.out / "config.json").read_text())
    for text in (result.plan.exactness, (result.out / "README.md").read_text(), config["llamamoe"]["exactness"]):
        assert sentence in text
    conditional = sentence.startswith("if")
    assert ("selected, if" in result.plan.exactness) == conditional


@pytest.mark.parametrize("target", FFN_TARGETS)
def test_float16_routers_are_shrunk_as_far_as_their_own_dtype_allows(tmp_path: Path, target: str) -> None:
    variant = variant_for(target)
    folder = make_dense(tmp_path / "dense", variant, dtype=torch.float16)
    plan = llamamoe.plan_conversion(folder, recipe(target=target))
    result = llamamoe.split(folder, tmp_path / "out", recipe(target=target), verify=False)
    stored_in_full = target == "ernie4_5_moe"
    assert any("float16 cannot hold router rows" in w for w in plan.warnings) != stored_in_full
    exponents = [layer["router_exponent"] for layer in result.receipt["layers"]]
    assert all(e < -8 for e in exponents) if stored_in_full else all(e >= -8 for e in exponents)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "return_dict"]
)
def test_the_source_does_not_decide_how_it_is_run(tmp_path: Path, key: str) -> None:
    folder = make_dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: False if key == "return_dict" else "evil/kernel"}))
    result = llamamoe.split(folder, tmp_path / "out", recipe())
    assert result.receipt["verification"]["passed"]
    assert key not in json.loads((result.out / "config.json").read_text())


def test_progress_counts_every_stage_to_its_end(source: Path, tmp_path: Path) -> None:
    steps: list[Any] = []
    llamamoe.split(source, tmp_path / "out", recipe(), progress=steps.append)
    last = {step.stage: (step.done, step.total) for step in steps}
    assert set(last) == {
        "convert",
        "check neurons",
        "check weights",
        "run parent",
        "run with equal weights",
        "run as stored",
    }
    assert all(done == total for done, total in last.values())


def test_the_receipt_keeps_what_differs_between_runs_under_run(source: Path, tmp_path: Path) -> None:
    one = llamamoe.split(source, tmp_path / "one", recipe()).receipt
    two = llamamoe.split(source, tmp_path / "two", recipe()).receipt
    assert {k: v for k, v in one.items() if k != "run"} == {k: v for k, v in two.items() if k != "run"}
    assert one["run"]["seconds"] > 0
    assert json.loads((tmp_path / "one" / "llamamoe_receipt.json").read_text()) == json.loads(json.dumps(one))


def test_a_receipt_needs_no_card(source: Path, tmp_path: Path) -> None:
    out = llamamoe.split(source, tmp_path / "out", recipe(card=False), verify=False).out
    assert not (out / "README.md").exists()
    assert (out / "llamamoe_receipt.json").exists()
