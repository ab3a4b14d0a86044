"""Another k: the same as a conversion with that k, whatever the architecture and the rescale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe import CheckpointError, RefusedError, UsageError, load_recipe, retop, split
from llamamoe.checkpoint.out_folder import DERIVED_FILE, RECEIPT_FILE

from ..dense import ROUTED, make_dense
from .outputs import logits

IDS = [target for _, target, _ in ROUTED]


def convert(dense: Path, out: Path, top_k: int, target: str, shared: Any, rescale: str) -> Path:
    given = {"method": "random", "target": target, "shared": shared, "shared_by": "weight_norm"}
    split(dense, out, load_recipe(given={**given, "num_experts": 3, "top_k": top_k, "rescale": rescale}), verify=False)
    return out


@pytest.mark.parametrize("rescale", ["dropout", "unit", "llama_moe"])
@pytest.mark.parametrize(("variant", "target", "shared"), ROUTED, ids=IDS)
def test_it_is_the_conversion_with_that_k(variant: str, target: str, shared: Any, rescale: str, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    one = convert(dense, tmp_path / "one", 1, target, shared, rescale)
    two = convert(dense, tmp_path / "two", 2, target, shared, rescale)
    found = retop(one, tmp_path / "out", 2)
    assert found.top_k == (1, 2)
    wanted = logits(two)
    assert torch.allclose(logits(found.out), wanted, atol=1e-5 * float(wanted.abs().max()))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (found.out, two))
    for config in (ours, theirs):
        config["llamamoe"] = {k: v for k, v in config["llamamoe"].items() if k in ("top_k", "factor", "baked_factor")}
    assert _same(ours, theirs)
    if found.exact:
        a, b = (load_file(folder / "model.safetensors") for folder in (found.out, two))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    return bool(ours == pytest.approx(theirs) if isinstance(ours, float) else ours == theirs)


@pytest.mark.parametrize(("rescale", "factor"), [("unit", 1.5), ("dropout", 1.0)])
def test_a_factor_that_is_no_power_of_two_is_said(rescale: str, factor: float, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", dtype=torch.bfloat16)
    two = convert(dense, tmp_path / "two", 2, "mixtral", 0, rescale)
    found = retop(two, tmp_path / "out", 3)
    assert found.factor == factor
    assert found.exact == (factor == 1.0)
    assert found.where == ("nowhere" if factor == 1.0 else "weights")
    assert ["rounded once" in each for each in found.warnings] == ([] if found.exact else [True])
    before, after = (load_file(folder / "model.safetensors") for folder in (two, found.out))
    for name, value in before.items():
        routed = ".w2." in name
        wanted = (value.float() * factor).bfloat16() if routed else value
        assert torch.equal(after[name], wanted), name


def test_a_trained_model_keeps_the_size_of_its_outputs(tmp_path: Path) -> None:
    from ..training.runs import make_world, recipe_of

    world = make_world(tmp_path / "world", target="qwen2_moe", shared="1x", num_experts=3, rescale="unit")
    trained = llamamoe.pretrain(recipe_of(world, "steps=1"), tmp_path / "run").model
    assert json.loads((trained / "config.json").read_text())["norm_topk_prob"] is True
    found = retop(trained, tmp_path / "out", 3)
    assert found.factor == 1.5  # each of 3 weighs 2/3 of what each of 2 did, and must count as much
    assert any("trained with 2" in each for each in found.warnings)
    model = AutoModelForCausalLM.from_pretrained(found.out)
    assert model.config.num_experts_per_tok == 3


def test_a_model_of_another_origin_is_left_to_its_router(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    two = convert(dense, tmp_path / "two", 2, "mixtral", 0, "unit")
    config = json.loads((two / "config.json").read_text())
    del config["llamamoe"]
    (two / "config.json").write_text(json.dumps(config))
    found = retop(two, tmp_path / "out", 1)
    assert found.where == "nowhere"
    assert any("does not record a rescale" in each for each in found.warnings)
    named = retop(two, tmp_path / "named", 1, rescale="unit")
    assert named.factor == 0.5


def test_one_shard_with_an_index_stays_loadable(tmp_path: Path) -> None:
    two = convert(make_dense(tmp_path / "dense"), tmp_path / "two", 2, "mixtral", 0, "unit")
    name = "model-00001-of-00001.safetensors"
    (two / "model.safetensors").rename(two / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(two / name), name)}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    out = retop(two, tmp_path / "out", 1).out
    assert logits(out).shape == logits(two).shape


def test_what_is_left_beside_the_weights(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", max_shard_size="100KB")
    two = convert(dense, tmp_path / "two", 2, "mixtral", 0, "unit")
    (two / RECEIPT_FILE).write_text('{"calibration": {"document_hashes": ["b", "a"]}}')
    out = retop(two, tmp_path / "out", 1).out
    receipt = json.loads((out / DERIVED_FILE).read_text())
    assert receipt["document_hashes"] == ["a", "b"]
    assert receipt["sources"] == [{"name": "two", "revision": None}]
    assert (receipt["from"], receipt["to"], receipt["factor"]) == (2, 1, 0.5)
    assert "1 of 3 selected" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    found = llamamoe.inspect(out)
    assert found.experts is not None
    assert found.experts.top_k == 1
    again = retop(two, out, 3, force=True)
    assert json.loads((again.out / "config.json").read_text())["llamamoe"]["retop"][0]["to"] == 3
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("top_k", "kind", "message"),
    [
        (0, UsageError, "k = 0, but it must be from 1 to 3"),
        (4, UsageError, "k = 4, but it must be from 1 to 3"),
        (2, UsageError, "k is 2 already"),
    ],
)
def test_a_silly_k_is_refused(top_k: int, kind: type[Exception], message: str, tmp_path: Path) -> None:
    two = convert(make_dense(tmp_path / "dense"), tmp_path / "two", 2, "mixtral", 0, "unit")
    with pytest.raises(kind, match=message):
        retop(two, tmp_path / "out", top_k)
    assert not (tmp_path / "out").exists()


def test_what_is_no_mixture_is_refused(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    with pytest.raises(RefusedError, match="'llama' is not a mixture of experts"):
        retop(dense, tmp_path / "out", 2)
    two = convert(dense, tmp_path / "two", 2, "mixtral", 0, "unit")
    with pytest.raises(UsageError, match="'dropuot' is not a rescale"):
        retop(two, tmp_path / "out", 1, rescale="dropuot")
    with pytest.raises(UsageError, match="converted with the rescale 'unit', so 'dropout' does not apply"):
        retop(two, tmp_path / "out", 1, rescale="dropout")
    quantised = json.loads((two / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    shutil.copytree(two, tmp_path / "quantised")
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(CheckpointError, match="quantised"):
        retop(tmp_path / "quantised", tmp_path / "out", 1)
    with pytest.raises(CheckpointError, match="is a file"):
        retop(two / "config.json", tmp_path / "out", 1)
    broken = json.loads((tmp_path / "two" / "config.json").read_text()) | {"num_local_experts": "many"}
    (tmp_path / "two" / "config.json").write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match="num_local_experts = 'many'"):
        retop(tmp_path / "two", tmp_path / "out", 1)
