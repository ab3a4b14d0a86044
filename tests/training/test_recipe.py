"""Recipes of pretraining that are accepted, and the errors of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llamamoe.errors import UsageError
from llamamoe.training.recipe import PretrainRecipe, load_pretrain_recipe

GOOD: dict[str, Any] = {"model": "moe", "parent": "dense", "data": {"train": "tokens"}, "steps": 10}
COMPETE = {"name": "competitive", "experts": True}


def load(*overrides: str, **keys: Any) -> PretrainRecipe:
    return load_pretrain_recipe(given=GOOD | keys, overrides=overrides)


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    recipe = load(
        losses=["switch", {"name": "cv_squared", "window": "all_ranks"}],
        gate="jitter",
        distill={"kl": {"weight": {"start": 1, "end": 0.5, "share": 0.5}, "top_m": 16}},
        balancing={"rate": 0.01},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = load_pretrain_recipe(path)
    assert again == recipe
    assert again.sha256() == recipe.sha256()


def test_tokens_become_steps() -> None:
    recipe = load("steps=null", "tokens=1e6", "batch_size=4", "data.block_length=1000")
    assert recipe.tokens_per_step == 4000
    assert recipe.max_steps == 250


def test_how_often_to_log_is_no_other_run() -> None:
    assert load("log_every=1", "save_every=7").sha256() == load().sha256()
    assert load("seed=1").sha256() != load().sha256()


def test_everything_wrong_is_told_at_once_with_near_misses() -> None:
    with pytest.raises(UsageError) as error:
        load(
            "optimizer.lrr=1", "batch_size=-1", "data.mixtures=llama", "gate=topk", "losses=[{name: swich}]", "stepz=1"
        )
    text = str(error.value)
    for part in (
        "optimizer.lrr: unknown key. Did you mean 'lr'",
        "batch_size",
        "data.mixtures: unknown key. Did you mean 'mixture'",
        "unknown gate 'topk'. Did you mean 'top_k'",
        "unknown loss 'swich'. Did you mean 'switch'",
        "stepz: unknown key. Did you mean 'steps'",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": 1e6}, r"set one of them to null \(--set tokens=null\)"),
        ({"steps": None}, "length of the run is missing"),
        ({"batch_size": 6, "micro_batch_size": 4}, "not a multiple of micro_batch_size"),
        ({"parent": None, "distill": {"kl": {}}}, "distill needs parent"),
        ({"data": {"train": "t", "update": "sheared_llama"}}, "needs data.reference_losses"),
        ({"data": {"train": "t", "reference_losses": "parent"}, "parent": None}, "needs parent"),
        ({"lora": {}, "distributed": {"fsdp_size": 2}}, "lora.train_router trains sharded routers"),
        (
            {"lora": {"train_router": False}, "distributed": {"fsdp_size": 2, "ep_size": 2}},
            "lora adds adapters to all experts on every rank",
        ),
        (
            {"lora": {"train_router": False}, "distributed": {"fsdp_size": 2}, "balancing": {}},
            "balancing moves biases, which a checkpoint of adapters does not hold",
        ),
        ({"freeze": ["router"], "losses": ["switch"]}, "no effect while freeze names router"),
        ({"trainer": {"learning_rate": 1.0}}, "learning_rate is decided by the recipe; set optimizer.lr"),
        ({"trainer": {"reprot_to": "none"}}, "Did you mean 'report_to'"),
        ({"trainer": {"optim": "adafactor"}}, "optim is decided by the recipe; set optimizer"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout does not reach adapters of experts"),
        ({"lora": {}, "freeze": ["attention"]}, "freeze names attention, which lora would train"),
        ({"lora": {}, "freeze": ["experts"]}, "freeze names experts, which lora would train"),
        ({"distributed": {"fsdp_size": 2, "ep_size": 4}}, "distributed.ep_size = 4 does not divide fsdp_size = 2"),
        ({"distributed": {"dp_replicate_size": 2}}, "dp_replicate_size copies what is sharded"),
        ({"distributed": {"tp_size": 2}}, "distributed.tp_size: unknown key"),
        ({"gate": "noisy_top_k", "balancing": {}}, "noisy_top_k"),
        ({"losses": ["competitive"], "parent": None}, "the loss competitive needs parent"),
        ({"data": {"train": "t", "documents": "apart"}, "attn_implementation": "flash_attention_2"}, "sdpa and eager"),
        ({"losses": [COMPETE], "freeze": ["experts"]}, "trains none while freeze names experts"),
        ({"losses": [COMPETE], "lora": {"experts": False}}, "trains none while lora.experts=false"),
        ({"losses": ["competitive"], "distributed": {"fsdp_size": 2}}, "competitive cannot be combined"),
    ],
)
def test_impossible_combinations(keys: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in (GOOD | keys).items() if value is not None}
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        load_pretrain_recipe(given=data)


def test_parts_that_the_file_leaves_out_can_be_set() -> None:
    recipe = load("optimizer.betas=[0.8, 0.9]", "router.start_std=null", "lora.rank=4")
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.router.start_std is None
    assert recipe.lora is not None
    assert recipe.lora.rank == 4


def test_the_yaml_is_complete() -> None:
    data = yaml.safe_load(load().to_yaml())
    assert set(data) == set(PretrainRecipe.model_fields)


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ((), "cpu", "llamamoe_auto"),
        ((), "cuda", "llamamoe_grouped_mm"),
        ((), "mps", None),
        (("precision.compute=float32",), "cuda", None),
        (("precision.parameters=bfloat16",), "cuda", None),
        (("distributed.fsdp_size=2",), "cuda", None),
        (("experts_implementation=eager",), "cpu", "eager"),
    ],
)
def test_how_experts_run_is_chosen_by_the_device(overrides: tuple[str, ...], device: str, expected: str | None) -> None:
    assert load(*overrides).experts_on(device) == expected


def test_fsdp_gathers_bfloat16_but_for_routers_that_need_more() -> None:
    assert load("distributed.fsdp_size=2").gathers_bfloat16("mixtral")
    assert not load("distributed.fsdp_size=2").gathers_bfloat16("ernie4_5_moe")
    assert not load("distributed.fsdp_size=2", "precision.compute=float32").gathers_bfloat16("mixtral")
    assert not load().gathers_bfloat16("mixtral")
