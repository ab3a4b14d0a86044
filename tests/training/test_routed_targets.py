"""Targets of the routed experts, against what the exact conversion makes of all experts; and a run that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe import pretrain
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.parameters import group_of
from llamamoe.training.parent import load_parent
from llamamoe.training.routed_targets import routed_targets
from llamamoe.training.routing import RouterTap

from .runs import lines_of, make_world, recipe_of

SPLITS = {"mixtral": {}, "qwen2_moe": {"shared": 44}, "granitemoeshared": {"shared": 44}, "glm4_moe": {"shared": "1x"}}


@pytest.mark.parametrize("target", sorted(SPLITS))
def test_they_are_all_experts_together(target: str, tmp_path: Path) -> None:
    num_experts = 3 if target == "glm4_moe" else 4
    world = make_world(tmp_path, target=target, **(SPLITS[target] | {"num_experts": num_experts, "rescale": "dropout"}))
    model = AutoModelForCausalLM.from_pretrained(world["model"]).eval()
    parent = load_parent(Path(world["parent"]), Path(world["model"]), dtype="float32")
    layers = find_moe_layers(model)
    tap = RouterTap(layers)
    with torch.no_grad(), tap.armed(inputs=True) as routings:
        model(torch.arange(3, 23)[None])
    targets = routed_targets(model, parent)
    assert len(routings) == 2
    for routing in routings:
        found_TH = targets(routing)
        x_TH, moe = routing.inputs_TH, routing.moe
        assert x_TH is not None
        everyone = torch.arange(moe.num_experts).expand(len(x_TH), -1)
        weights = torch.full(everyone.shape, moe.factor / moe.num_experts)
        with torch.no_grad():
            expected_TH = moe.experts(x_TH, everyone, weights)
        assert float((found_TH - expected_TH).abs().max()) < 1e-4 * float(expected_TH.abs().max())


def test_routers_learn_from_competition_alone(tmp_path: Path) -> None:
    """With all else frozen and no other loss, the gradient is that of the competition (what it leads to: its own tests)."""
    world = make_world(tmp_path / "world", target="qwen2_moe", shared=44)
    frozen = ("experts", "shared", "attention", "norms", "embeddings", "head")
    recipe = recipe_of(world, "steps=2", losses=[{"name": "competitive"}], distill={"lm": {"weight": 0}}, freeze=frozen)
    pretrain(recipe, tmp_path / "run")
    lines = [line for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["terms"]["competitive"])
        assert line["grad_norm"] > 1e-4
    before = AutoModelForCausalLM.from_pretrained(world["model"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in after if name.endswith("mlp.gate.weight")} <= moved
    assert {group_of(name) for name in moved if not name.endswith("down_proj")} == {"router"}  # those carry k/N
