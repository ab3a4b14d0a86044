"""Back to a dense checkpoint: the parent's, bit for bit where the conversion was exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import llamamoe
from llamamoe import CheckpointError, RefusedError, densify, load_recipe, retop, split

from ..dense import make_byte_level, make_dense
from .outputs import logits

CASES = [
    ("llama", "mixtral", 0),
    ("llama-tied", "mixtral", 0),
    ("llama-head-dim", "mixtral", 0),
    ("mistral-window", "mixtral", 0),
    ("llama-tied", "qwen2_moe", "1x"),
    ("llama-llama3-rope", "qwen2_moe", 0),
    ("qwen2", "qwen2_moe", "1x"),
    ("qwen2-windows", "qwen2_moe", 0),
    ("qwen3-tied", "qwen3_moe", 0),
    ("llama-llama3-rope", "glm4_moe", 0),
    ("qwen2", "glm4_moe", "1x"),
    ("qwen3", "glm4_moe", "2x"),
    ("llama", "granitemoeshared", "1x"),
    ("llama-attention-bias", "granitemoeshared", 0.25),
    ("granite", "granitemoeshared", 0),
    ("smollm3-windows", "granitemoe_swa", "1x"),
    ("hunyuan_v1_dense-alpha", "hunyuan_v1_moe", 0),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "1x"),
    ("olmo2", "flex_olmo", 0),
    ("cohere", "cohere2_moe", 0),
    ("cohere2", "cohere2_moe", "1x"),
    ("qwen3_5_text", "qwen3_5_moe_text", 0),
    ("qwen3_5_text-biases", "qwen3_5_moe_text", "1x"),
    ("cohere2-biases", "cohere2_moe", 0),
    ("olmo2-biases", "flex_olmo", 0),
    ("llama-tied", "ernie4_5_moe", 0),
    ("llama-head-dim", "ernie4_5_moe", "2x"),
]
IDS = [f"{variant}-{target}-{shared}" for variant, target, shared in CASES]


def convert(dense: Path, out: Path, target: str = "mixtral", **keys: Any) -> Path:
    given = {"method": "random", "num_experts": 5, "top_k": 2, "target": target, "shared_by": "weight_norm"}
    split(dense, out, load_recipe(given=given | keys), verify=False)
    return out


@pytest.mark.parametrize("rescale", ["unit", "dropout"])
@pytest.mark.parametrize(("variant", "target", "shared"), CASES, ids=IDS)
def test_it_is_the_parent(variant: str, target: str, shared: Any, rescale: str, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    moe = convert(dense, tmp_path / "moe", target, shared=shared, rescale=rescale)
    found = densify(moe, tmp_path / "out", like=dense)
    assert found.intermediate_size == 172
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found.out, dense))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "down_proj" in name and not found.exact:
            assert torch.allclose(ours[name], value, rtol=2e-7, atol=0)
        else:
            assert torch.equal(ours[name], value), name
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (found.out, dense))
    assert config["model_type"] == before["model_type"]
    wanted = logits(dense)
    assert torch.allclose(logits(found.out), wanted, atol=2e-6 * float(wanted.abs().max()))
    assert AutoTokenizer.from_pretrained(found.out)("ab")["input_ids"]


@pytest.mark.parametrize(
    ("variant", "target", "model_type"),
    [("phi3-window", "mixtral", "mistral"), ("gemma", "mixtral", "llama"), ("phi3-longrope", "mixtral", "llama")],
)
def test_families_with_files_of_their_own_come_back_as_a_plain_one(
    variant: str, target: str, model_type: str, tmp_path: Path
) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    out = densify(convert(dense, tmp_path / "moe", target), tmp_path / "out").out
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    wanted = logits(dense)
    assert torch.allclose(logits(out), wanted, atol=5e-6 * float(wanted.abs().max()))


def test_it_is_of_the_family_of_the_parent_that_is_named(tmp_path: Path) -> None:
    """Qwen2 could hold the attention, but transformers opens every tokenizer beside it as Qwen's."""
    dense = make_dense(tmp_path / "dense", "seed-oss", vocab_size=300)
    make_byte_level(dense)
    moe = convert(dense, tmp_path / "moe", "glm4_moe", shared="1x")
    out = densify(moe, tmp_path / "out", like=dense).out
    assert json.loads((out / "config.json").read_text())["model_type"] == "seed_oss"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, dense))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(out), logits(dense))


def test_without_an_order_the_function_is_the_same(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama-tied")
    moe = convert(dense, tmp_path / "moe", "granitemoeshared", shared=0.25, num_experts=4, rescale="dropout")
    found = densify(moe, tmp_path / "out", shard_size="100KB")
    assert found.exact
    assert (found.out / "model.safetensors.index.json").is_file()
    wanted = logits(dense)
    assert torch.allclose(logits(found.out), wanted, atol=2e-6 * float(wanted.abs().max()))


def test_dense_layers_and_another_k_come_back_too(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "llama-tied")
    moe = convert(dense, tmp_path / "moe", "qwen2_moe", keep_dense=[0], num_experts=4, rescale="unit")
    found = densify(retop(moe, tmp_path / "retop", 4).out, tmp_path / "out", like=dense)
    assert found.exact
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found.out, dense))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_neurons_in_several_experts_are_refused(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    keys = {"method": {"name": "gradient", "overlap": "inner"}, "calibration": [str(tmp_path / "text.txt")]}
    keys |= {"calibration_tokens": 2048, "calibration_length": 64, "repair": "none", "rescale": "unit"}
    moe = convert(dense, tmp_path / "moe", num_experts=4, **keys)
    with pytest.raises(RefusedError, match="layer 0: neurons are in several experts"):
        densify(moe, tmp_path / "out")
    assert any("scaled for 2 selected" in each for each in retop(moe, tmp_path / "retop", 3).warnings)


def test_neurons_that_the_parent_has_twice_stay_two(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    for part in ("gate", "up"):
        rows = tensors[f"model.layers.0.mlp.{part}_proj.weight"]
        rows[5], rows[9] = rows[3], 0.0  # a neuron twice, and one that only has a down column
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    out = densify(convert(dense, tmp_path / "moe"), tmp_path / "out").out
    wanted = logits(dense)
    assert torch.allclose(logits(out), wanted, atol=2e-6 * float(wanted.abs().max()))


def test_a_repaired_conversion_says_what_it_keeps(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    keys: dict[str, Any] = {
        "method": "token_clusters",
        "calibration": [str(tmp_path / "text.txt")],
        "repair": "least_squares",
    }
    keys |= {"calibration_tokens": 2048, "calibration_length": 64, "num_experts": 4, "target": "qwen2_moe"}
    moe = convert(dense, tmp_path / "moe", **keys)
    found = densify(moe, tmp_path / "out", like=dense)
    assert any("repaired" in each for each in found.warnings)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found.out, dense))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) == ("down_proj" not in name)


def test_a_trained_model_is_the_sum_of_its_experts(tmp_path: Path) -> None:
    """Its logits are those with all experts selected and each counted as in training."""
    from ..training.runs import make_world, recipe_of

    world = make_world(tmp_path / "world", num_experts=4, rescale="unit", target="qwen2_moe", shared="1x")
    trained = llamamoe.pretrain(recipe_of(world, "steps=2", precision={"save": "float32"}), tmp_path / "run").model
    # transformers 5 opens whatever stands beside a qwen2 model as a Qwen2Tokenizer, which this one is not
    with pytest.raises(CheckpointError, match="cannot be carried over exactly: beside a model of type qwen2"):
        densify(trained, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    for path in trained.glob("tokenizer*"):
        path.unlink()
    found = densify(trained, tmp_path / "out")
    assert any("trained with few experts" in each for each in found.warnings)
    assert not found.exact
    assert found.intermediate_size == 172
    every = retop(trained, tmp_path / "every", 4).out
    tensors = load_file(every / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight") or name.endswith("shared_expert_gate.weight"):
            tensors[name].zero_()  # equal weights, and one half for the shared expert
    save_file(tensors, every / "model.safetensors", {"format": "pt"})
    wanted = logits(every)
    assert torch.allclose(logits(found.out), wanted, atol=5e-6 * float(wanted.abs().max()))


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_what_cannot_be_one_ffn_is_refused(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    copies = convert(dense, tmp_path / "copies", method="upcycle", num_experts=2, rescale="mean", top_k=1)
    with pytest.raises(RefusedError, match="copies of one FFN"):
        densify(copies, tmp_path / "out")
    with pytest.raises(RefusedError, match="'llama' is not a mixture of experts"):
        densify(dense, tmp_path / "out")
    partial = convert(make_dense(tmp_path / "phi", "phi3-partial"), tmp_path / "partial", "glm4_moe")
    with pytest.raises(RefusedError, match=r"no dense architecture supports the attention: .*rotary"):
        densify(partial, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_order_of_another_model_is_refused(tmp_path: Path) -> None:
    moe = convert(make_dense(tmp_path / "dense"), tmp_path / "moe")
    other = make_dense(tmp_path / "other", seed=1)
    with pytest.raises(RefusedError, match="layer 0: its neurons differ from those"):
        densify(moe, tmp_path / "out", like=other)


def test_a_model_of_another_origin_must_name_its_rescale(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    moe = convert(dense, tmp_path / "moe", rescale="unit")
    config = json.loads((moe / "config.json").read_text())
    del config["llamamoe"]
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="not converted by llamamoe"):
        densify(moe, tmp_path / "out")
    out = densify(moe, tmp_path / "out", rescale="unit", like=dense).out
    wanted = logits(dense)
    assert torch.allclose(logits(out), wanted, atol=2e-6 * float(wanted.abs().max()))


def test_tensors_that_would_be_lost(tmp_path: Path) -> None:
    moe = convert(make_dense(tmp_path / "dense"), tmp_path / "moe")
    tensors = load_file(moe / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors of .*eh_proj"):
        densify(moe, tmp_path / "out")


def test_the_model_whose_order_is_asked_for_is_never_replaced(tmp_path: Path) -> None:
    moe = convert(make_dense(tmp_path / "dense"), tmp_path / "moe")
    back = densify(moe, tmp_path / "back").out
    with pytest.raises(RefusedError, match=r"and --like \(.*must not contain each other"):
        densify(moe, back, like=back, force=True)


def test_files_that_disagree_with_their_configuration(tmp_path: Path) -> None:
    moe = convert(make_dense(tmp_path / "dense"), tmp_path / "moe")
    tensors = load_file(moe / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"] = torch.zeros(64, 3)
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.weight has shape \[64, 3\]"):
        densify(moe, tmp_path / "out")


def test_attention_sinks_that_take_weight_are_not_dropped(tmp_path: Path) -> None:
    moe = convert(make_dense(tmp_path / "dense", "smollm3"), tmp_path / "moe", "granitemoe_swa")
    tensors = load_file(moe / "model.safetensors")
    tensors["model.layers.1.self_attn.sinks"][2] = -1.0
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RefusedError, match=r"model\.layers\.1\.self_attn\.sinks holds attention sinks that take weight"
    ):
        densify(moe, tmp_path / "out")
