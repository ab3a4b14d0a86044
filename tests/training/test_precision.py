"""Weights in bfloat16: what a step of Adam leaves of them, and the refusal to train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamamoe import plan_pretraining, pretrain
from llamamoe.errors import UsageError
from llamamoe.training.parameters import optimizer_groups
from llamamoe.training.recipe import PretrainRecipe

from .runs import recipe_of
from .tiny_moe import tiny_moe

HALF = {"parameters": "bfloat16", "compute": "bfloat16"}


def changed_share(dtype: torch.dtype, lr: float) -> float:
    """Of weights as large as those of trained models (0.02), by a step in the middle of a run."""
    model: Any = tiny_moe("mixtral")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=draw)
    model.to(dtype)
    given = {"model": "m", "data": {"train": "t"}, "steps": 1, "optimizer": {"lr": lr, "down_lr_factor": 1.0}}
    optimizer = torch.optim.AdamW(optimizer_groups(model, PretrainRecipe.model_validate(given)), fused=True)
    before = after = torch.empty(0)
    for _ in range(20):
        before = torch.cat([each.detach().flatten() for each in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
        optimizer.step()
        after = torch.cat([each.detach().flatten() for each in model.parameters()])
    return float((after != before).float().mean())


@pytest.mark.parametrize("lr", [2e-5, 5e-5])
def test_a_step_changes_float32_weights_and_few_in_bfloat16(lr: float) -> None:
    assert changed_share(torch.float32, lr) > 0.99
    assert changed_share(torch.bfloat16, lr) < 0.2


@pytest.mark.parametrize("run", ["plan", "train"])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"optimizer": {"lr": 2e-5}}, r"steps of about 2e-05 leave every weight above 0.0102 .*parameters=float32"),
        ({"optimizer": {"router_lr": 1e-4}, "lora": {}}, r"about 0.0001 .*0.0512 .*lora.train_router=false"),
    ],
    ids=["full", "lora"],
)
def test_training_weights_in_bfloat16_is_refused(
    run: str, keys: dict[str, Any], expected: str, world: dict[str, str], tmp_path: Path
) -> None:
    recipe = recipe_of(world, precision=HALF, **keys)
    with pytest.raises(UsageError, match=expected):
        plan_pretraining(recipe) if run == "plan" else pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_on_bfloat16_weights_are_trained(world: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(world, "steps=1", precision=HALF, lora={"train_router": False})
    assert pretrain(recipe, tmp_path / "run").steps == 1
