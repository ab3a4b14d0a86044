"""Learning rates by step and group, and what is in which group."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llamamoe.errors import CheckpointError, UsageError
from llamamoe.training.lora import add_adapters
from llamamoe.training.parameters import LrSchedule, freeze, group_of, lr_factors, optimizer_groups

from ..dense import COMMON
from .runs import make_world, recipe_of

TARGETS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_moe_text": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "full_attention_interval": 2},
    "cohere2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}
    | {"head_dim": 16, "shared_expert_combination_strategy": "sum", "tie_word_embeddings": False},
    "granitemoe_swa": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "ernie4_5_moe": {
        "tie_word_embeddings": False,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
}
SMALL = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}


def model_of(name: str) -> torch.nn.Module:
    config = AutoConfig.for_model(name, **{**COMMON, **SMALL, **TARGETS[name]})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_parameter_has_a_group(name: str) -> None:
    found = {parameter: group_of(parameter) for parameter, _ in model_of(name).named_parameters()}
    assert {"router", "experts", "attention", "norms", "embeddings", "head"} <= set(found.values())
    for parameter, group in found.items():
        assert (group == "experts") == (".experts." in parameter), parameter
        assert ("norm" in parameter) == (group == "norms"), parameter
    assert ("shared" in found.values()) == (name not in ("mixtral", "qwen3_moe", "flex_olmo"))


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(UsageError, match="mystery"):
        group_of("model.layers.0.mystery.weight")


def test_groups_have_rates_and_decay(tmp_path: Path) -> None:
    recipe = recipe_of(make_world(tmp_path), optimizer={"lr": 1e-3, "router_lr": 5e-4, "weight_decay": 0.1})
    model = model_of("qwen2_moe")
    groups = optimizer_groups(model, recipe)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_name = {(group["name"], group["weight_decay"] > 0): group["lr"] for group in groups}
    assert by_name == {("experts", True): 1e-3, ("rest", True): 1e-3, ("rest", False): 1e-3, ("router", False): 5e-4}
    one_dimensional = [p for group in groups if group["weight_decay"] for p in group["params"] if p.ndim < 2]
    assert not one_dimensional


def test_scaled_down_projections_learn_as_fast_relative_to_their_size(tmp_path: Path) -> None:
    """A step of Adam on weights that were multiplied by f, at f times the rate, is f times the plain model's step."""
    world = make_world(tmp_path)
    recipe = recipe_of(world, optimizer={"lr": 1e-3, "experts_lr": 2e-3, "weight_decay": 0.1})
    model = model_of("qwen2_moe")
    model.config.llamamoe = {"baked_factor": 16.0}
    groups = {group["name"]: group for group in optimizer_groups(model, recipe) if group["weight_decay"]}
    down = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    assert [id(p) for p in groups["experts_down"]["params"]] == [id(p) for p in down]
    assert groups["experts_down"]["lr"] == 16 * groups["experts"]["lr"] == 16 * 2e-3
    plain = torch.nn.Parameter(torch.randn(3, 4))
    scaled = torch.nn.Parameter(16 * plain.detach())
    for parameter, group in ((plain, groups["experts"]), (scaled, groups["experts_down"])):
        step = torch.optim.AdamW([{**group, "params": [parameter]}], eps=0.0)
        parameter.grad = torch.arange(12.0).reshape(3, 4) - 5.5
        step.step()
    assert torch.allclose(scaled, 16 * plain, rtol=1e-5)
    plain_rates = recipe_of(world, optimizer={"down_lr_factor": 1.0})
    assert "experts_down" not in {group["name"] for group in optimizer_groups(model, plain_rates)}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoeshared"])
def test_adapters_of_scaled_down_projections_do_too(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = recipe_of(make_world(tmp_path), lora={"rank": 2, "alpha": 4, "experts": True})
    config = AutoConfig.for_model(name, **{**COMMON, **SMALL, **TARGETS[name]})
    config.llamamoe = {"baked_factor": 4.0}
    assert recipe.lora is not None
    wrapped = add_adapters(AutoModelForCausalLM.from_config(config), recipe.lora)
    group = next(group for group in optimizer_groups(wrapped, recipe) if group["name"] == "experts_down")
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    down = {names[id(parameter)] for parameter in group["params"]}
    assert down
    assert all("lora_B" in name for name in down)
    # Each B of a down projection has as many rows as outputs: [H, r x N], that of gate and up has twice the width's.
    assert {parameter.shape[0] for parameter in group["params"]} == {COMMON["hidden_size"]}
    rates = {group["name"]: group["lr"] for group in optimizer_groups(wrapped, recipe)}
    assert rates["experts_down"] == 4 * rates["experts"]


@pytest.mark.parametrize("value", [0, -4, "x", float("nan"), True])
def test_a_factor_that_cannot_be_is_named(value: object, tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.config.llamamoe = {"baked_factor": value}
    with pytest.raises(CheckpointError, match="baked_factor"):
        optimizer_groups(model, recipe_of(make_world(tmp_path)))


def test_routers_go_first(tmp_path: Path) -> None:
    recipe = recipe_of(make_world(tmp_path), "steps=10", router={"warmup_steps": 4})
    router, rest = lr_factors([{"name": "router"}, {"name": "rest"}], recipe)
    assert [rest(step) for step in range(4)] == [0, 0, 0, 0]
    assert all(router(step) > 0 for step in range(10))
    assert rest(4) == 1


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_schedules_rise_hold_and_end_where_they_should(shape: str) -> None:
    schedule = LrSchedule(shape, warmup_steps=10, max_steps=100, min_ratio=0.1, decay_share=0.2)
    values = [schedule(step) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1
    assert max(values) == 1
    assert values[100] == pytest.approx(1.0 if shape == "constant" else 0.1)
    if shape == "cosine":
        assert values[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    if shape == "linear":
        assert values[55] == pytest.approx(0.55)
    if shape == "wsd":
        assert values[80] == 1
        assert values[90] == pytest.approx(0.55)


def test_freezing_everything_or_half_of_a_tie_is_refused() -> None:
    model = model_of("mixtral")
    with pytest.raises(UsageError, match="nothing is left"):
        freeze(model, ("router", "experts", "attention", "norms", "embeddings", "head"))
    model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="both or neither"):
        freeze(model, ("head",))


def test_selection_biases_take_no_gradient() -> None:
    trained = freeze(model_of("ernie4_5_moe"), ())
    model = model_of("ernie4_5_moe")
    freeze(model, ())
    assert all(not p.requires_grad for name, p in model.named_parameters() if "e_score_correction_bias" in name)
    assert trained["router"] == 2 * 4 * 64
