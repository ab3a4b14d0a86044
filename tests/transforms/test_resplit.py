"""Smaller experts: the same function as the mixture's, whatever the architecture, who made it and how its router weighs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamamoe import RefusedError, UsageError, load_recipe, resplit, retop, split
from llamamoe.architectures.targets import TARGETS
from llamamoe.checkpoint.out_folder import DERIVED_FILE
from llamamoe.transforms.resplitting.recipe import usable_methods

from ..dense import ROUTED, make_dense
from .outputs import logits

ROUTED = [each for each in ROUTED if TARGETS.get(each[1]).shared != "one"]
IDS = [target for _, target, _ in ROUTED]
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
FOREIGN: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 5},
    "qwen3_moe": {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 5, "mlp_only_layers": [0]},
    "qwen2_moe": {"intermediate_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
                  "num_experts": 5, "norm_topk_prob": False},
    "glm4_moe": {"intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 5, "n_shared_experts": 2,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    "granitemoeshared": {"intermediate_size": 24, "num_local_experts": 5, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"intermediate_size": 24, "num_experts": 5, "moe_topk": 2},
    "qwen3_5_moe_text": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 5, "head_dim": 8,
                         "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 1,
                         "linear_num_value_heads": 2, "full_attention_interval": 2},
    "cohere2_moe": {"intermediate_size": 24, "num_experts": 5, "head_dim": 8, "num_shared_experts": 2, "rms_norm_eps": 1e-5,
                    "shared_expert_combination_strategy": "sum", "first_k_dense_replace": 1,
                    "prefix_dense_intermediate_size": 40, "sliding_window": 8},
    "flex_olmo": {"intermediate_size": 24, "num_experts": 5, "norm_topk_prob": False, "pad_token_id": 0},
    "granitemoe_swa": {"intermediate_size": 24, "num_local_experts": 5, "shared_intermediate_size": 40,
                       "sliding_window": 8, "layer_rope_theta": [0.0, 1e4]},
    "ernie4_5_moe": {"intermediate_size": 48, "moe_intermediate_size": 24, "moe_num_experts": 5, "moe_k": 2,
                     "moe_num_shared_experts": 2, "moe_layer_start_index": 1},
}  # fmt: skip


def foreign(folder: Path, name: str, **changes: Any) -> Path:
    """A random mixture that llamamoe did not write, with every bias and gate drawn at random as well."""
    config = transformers.CONFIG_MAPPING[name](**SIZES | FOREIGN[name] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and "inv_freq" not in key:
                size = 0.05 if "correction_bias" in key else 0.2  # as large as differences between scores
                value.copy_(size * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def assert_same_function(out: Path, source: Path) -> None:
    wanted = logits(source)
    assert torch.allclose(logits(out), wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", [name for name in FOREIGN if TARGETS.get(name).shared != "one"])
@pytest.mark.parametrize(("pieces", "method"), [(2, "kmeans"), (3, "random")])
def test_a_mixture_of_another_origin_computes_the_same(name: str, pieces: int, method: str, tmp_path: Path) -> None:
    source = foreign(tmp_path / "moe", name)
    found = resplit(source, tmp_path / "out", pieces, method=method)
    assert (found.num_experts, found.top_k) == ((5, 5 * pieces), (2, 2 * pieces))
    assert (found.factor, found.exact) == (pieces, pieces == 2 or name == "glm4_moe")
    assert_same_function(tmp_path / "out", source)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {
        "llamamoe", "num_experts_per_tok", "moe_k", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts",
        "routed_scaling_factor", "moe_num_shared_experts", "n_shared_experts", "num_shared_experts",
        "moe_intermediate_size",
        *(["intermediate_size"] if name in ("mixtral", "granitemoeshared", "granitemoe_swa", "flex_olmo", "cohere2_moe") else []),
    }  # fmt: skip


@pytest.mark.parametrize("rescale", ["dropout", "unit"])
@pytest.mark.parametrize(("variant", "target", "shared"), ROUTED, ids=IDS)
def test_a_conversion_is_split_again_and_still_fits_retop(
    variant: str, target: str, shared: Any, rescale: str, tmp_path: Path
) -> None:
    dense = make_dense(tmp_path / "dense", variant)
    recipe = {"method": "random", "target": target, "shared": shared, "shared_by": "weight_norm", "rescale": rescale}
    moe = split(dense, tmp_path / "moe", load_recipe(given={**recipe, "num_experts": 3, "top_k": 2}), verify=False).out
    found = resplit(moe, tmp_path / "out", 2)
    assert found.out is not None
    assert_same_function(found.out, moe)
    # all pieces of all experts are the dense model again
    wanted = logits(retop(moe, tmp_path / "all", 3).out)
    whole = retop(found.out, tmp_path / "whole", 6)
    assert torch.allclose(logits(whole.out), wanted, atol=1e-5 * float(wanted.abs().max()))


@settings(max_examples=12)
@given(width=st.integers(2, 40), pieces=st.integers(2, 7), method=st.sampled_from(["kmeans", "random"]))
def test_every_neuron_is_in_one_piece(
    width: int, pieces: int, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pieces = min(pieces, width)
    folder = tmp_path_factory.mktemp("moe")
    source = foreign(folder / "moe", "mixtral", intermediate_size=width, num_hidden_layers=1, num_local_experts=2)
    found = resplit(source, folder / "out", pieces, method=method, seed=3)
    before, after = (load_file(path / "model.safetensors") for path in (source, folder / "out"))
    for expert in range(2):
        block = "model.layers.0.block_sparse_moe.experts."
        rows = {tuple(row) for row in before[f"{block}{expert}.w1.weight"].tolist()}
        held = [after[f"{block}{expert * pieces + piece}.w1.weight"] for piece in range(pieces)]
        filled = [tuple(row) for part in held for row in part.tolist() if any(row)]
        assert sorted(filled) == sorted(rows)
        sizes = [int(part.any(1).sum()) for part in held]
        assert max(sizes) <= -(-width // pieces) <= found.expert_width[1]
        assert found.expert_width[1] % 8 == 0
    assert found.padding == pieces * found.expert_width[1] - width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_runs_pieces_of_any_width(dtype: torch.dtype, tmp_path: Path) -> None:
    source = foreign(tmp_path / "moe", "qwen3_moe", moe_intermediate_size=176)
    found = resplit(source, tmp_path / "out", 3)
    assert (found.expert_width, found.padding) == ((176, 64), 16)
    assert any("each expert of MODEL gets 16 zero neurons" in each for each in found.warnings)
    assert not any("can fail" in each for each in found.warnings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        assert bool(model(torch.arange(9)[None]).logits.isfinite().all())


def test_pieces_differ_from_expert_to_expert_and_follow_the_seed(tmp_path: Path) -> None:
    source = foreign(tmp_path / "moe", "mixtral", intermediate_size=32)
    one, same, two = (
        load_file(resplit(source, tmp_path / name, 2, method="random", seed=seed).out / "model.safetensors")  # type: ignore[operator]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], two[name]) for name in one)
    before = load_file(source / "model.safetensors")
    orders = []
    for expert in range(5):
        whole = before[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"]
        piece = one[f"model.layers.0.block_sparse_moe.experts.{2 * expert}.w1.weight"]
        orders.append([int((whole == row).all(1).nonzero()) for row in piece])
    assert len(np.unique(orders, axis=0)) > 1


def test_a_plan_writes_nothing_and_says_what_the_result_has(tmp_path: Path) -> None:
    source = foreign(tmp_path / "moe", "qwen3_moe")
    plan = resplit(source, None, 3, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]
    found = resplit(source, tmp_path / "out", 3)
    assert plan.facts == found.facts
    assert any("8 neurons are narrow" in each for each in plan.warnings)
    assert plan.nbytes == sum(value.nbytes for value in load_file(tmp_path / "out/model.safetensors").values())
    receipt = json.loads((tmp_path / "out" / DERIVED_FILE).read_text())
    assert receipt["made_by"] == "resplit"
    assert {key: receipt[key] for key in ("pieces", "method", "seed")} == {"pieces": 3, "method": "kmeans", "seed": 0}
    assert json.loads(json.dumps(found.to_json()))["num_experts"] == [5, 15]


def test_what_cannot_be_the_same_function_is_refused(tmp_path: Path) -> None:
    grouped = foreign(tmp_path / "groups", "glm4_moe", n_routed_experts=4, n_group=2, topk_group=1)
    with pytest.raises(RefusedError, match="2 groups of experts"):
        resplit(grouped, tmp_path / "out", 2)
    source = foreign(tmp_path / "moe", "glm4_moe", n_shared_experts=1)
    with pytest.raises(
        RefusedError, match=r"24 is not a multiple of 16 = 24 / 2, rounded up to a multiple of 8"
    ) as refused:
        resplit(source, tmp_path / "out", 2)
    assert "that fit: 3, 4, 5, 6, 7, 8." in str(refused.value.hint)
    with pytest.raises(UsageError, match="must be from 2 to 24"):
        resplit(source, tmp_path / "out", 25)
    with pytest.raises(UsageError, match="must be from 2 to 24"):
        resplit(source, tmp_path / "out", 1)
    with pytest.raises(UsageError, match="'token_clusters' needs text") as textless:
        resplit(source, tmp_path / "out", 3, method="token_clusters")
    assert "Give --calibration, and --top-k below 6. Without text: cluster_shared, kmeans" in str(textless.value.hint)
    with pytest.raises(UsageError, match="unknown splitter 'foo'") as unknown:
        resplit(source, tmp_path / "out", 3, method="foo")
    assert "upcycle" not in str(unknown.value)
    with pytest.raises(RefusedError, match="not a mixture of experts"):
        resplit(make_dense(tmp_path / "dense"), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_rescale_that_depends_on_the_number_of_experts_is_not_claimed(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    recipe = {"method": "random", "num_experts": 4, "top_k": 2, "rescale": "llama_moe", "target": "mixtral"}
    moe = split(dense, tmp_path / "moe", load_recipe(given=recipe), verify=False).out
    found = resplit(moe, tmp_path / "out", 2)
    assert any("no longer recorded" in each for each in found.warnings)
    assert json.loads((tmp_path / "out/config.json").read_text())["llamamoe"]["rescale"] is None
    assert_same_function(tmp_path / "out", moe)


def test_methods_without_text() -> None:
    assert {"kmeans", "random"} <= set(usable_methods())
    assert not {"static", "upcycle", "token_clusters", "gradient"} & set(usable_methods())


def test_one_shared_expert_of_an_experts_width_leaves_no_finer_ones(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "moe", "hunyuan_v1_moe")
    with pytest.raises(RefusedError, match="hunyuan_v1_moe stores one shared expert"):
        resplit(folder, None, 2, dry_run=True)
