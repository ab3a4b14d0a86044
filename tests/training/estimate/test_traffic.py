"""Bytes of copies, against what the operations of a forward and a backward pass of grouped experts read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.models.experts import register_experts
from llamamoe.training.estimate.estimate import Estimate, estimate
from llamamoe.training.estimate.hardware import Hardware
from llamamoe.training.estimate.memory import StepMemory
from llamamoe.training.estimate.shapes import read_shape
from llamamoe.training.estimate.sharding import Sharding
from llamamoe.training.estimate.traffic import copied_bytes, exchanged_bytes, gathered_bytes
from llamamoe.training.recipe import PretrainRecipe, load_pretrain_recipe

TOKENS, EXPERTS = 256, 16
VIEWS = {"_unsafe_view"}
NOT_READ = {"new_zeros", "empty_like", "new_empty", "zeros_like", "ones_like"}
"""Operations that look at the form of their input only."""


class Moved(TorchDispatchMode):
    """Sums the bytes of inputs and outputs of all operations but products and views."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = (
            [] if name in NOT_READ else [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        )
        outputs = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        is_view = any(alias.alias_info is not None and not alias.alias_info.is_write for alias in func._schema.returns)
        if name != "_grouped_mm" and name not in VIEWS and not is_view:
            self.total += sum(each.numel() * each.element_size() for each in (*inputs, *outputs))
        return out


def case(tmp_path: Path, hidden: int, width: int, k: int, **keys: Any) -> tuple[Any, PretrainRecipe, StepMemory]:
    """A layer of experts in bfloat16, a recipe of one block, and the estimate's view of it."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=hidden, intermediate_size=width, num_local_experts=EXPERTS, num_experts_per_tok=k,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    register_experts()
    model.set_experts_implementation("llamamoe_grouped_mm")
    model.save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "data": {"train": "t", "block_length": TOKENS}, "steps": 1, "batch_size": 1} | keys
    recipe = load_pretrain_recipe(given=given | {"device": "cuda"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    sizes = Sharding(recipe.distributed.fsdp_size, recipe.distributed.ep_size)
    shape = read_shape(checkpoint.config, checkpoint.tensors)
    return model.model.layers[0].mlp.experts, recipe, StepMemory(recipe, shape, sizes)


@pytest.mark.parametrize(("hidden", "width", "k"), [(256, 64, 2), (256, 64, 8), (512, 64, 4), (256, 128, 4)])
def test_copies_are_what_the_operations_move(hidden: int, width: int, k: int, tmp_path: Path) -> None:
    experts, recipe, memory = case(tmp_path, hidden, width, k)
    x_TH = torch.randn(TOKENS, hidden, dtype=torch.bfloat16, requires_grad=True)
    indices_Tk = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(TOKENS)])
    weights_Tk = torch.rand(TOKENS, k, dtype=torch.bfloat16, requires_grad=True)
    with Moved() as forward:
        out_TH = experts(x_TH, indices_Tk, weights_Tk)
    gradient = torch.ones_like(out_TH)
    with Moved() as backward:
        out_TH.backward(gradient)
    assert copied_bytes(recipe, memory.run) == pytest.approx(forward.total + backward.total, rel=0.05)
    again = recipe.model_copy(update={"gradient_checkpointing": True})
    assert copied_bytes(again, memory.run) == pytest.approx(2 * forward.total + backward.total, rel=0.05)


def planned(recipe: PretrainRecipe, folder: Path, ranks: int, **keys: Any) -> Estimate:
    checkpoint = SafetensorsCheckpoint(folder)
    return estimate(recipe, checkpoint.config, checkpoint.tensors, Hardware(ranks, peak_flops=1e12, **keys))


def test_copies_take_time_or_the_plan_says_that_they_are_left_out(tmp_path: Path) -> None:
    _, recipe, memory = case(tmp_path, 256, 64, 8, batch_size=4)
    without, known = planned(recipe, tmp_path, 1), planned(recipe, tmp_path, 1, bandwidth=1e9)
    assert without.moved["copies"] == 4 * copied_bytes(recipe, memory.run) > 0
    assert without.seconds_per_step is not None
    assert known.seconds_per_step == pytest.approx(without.seconds_per_step + without.moved["copies"] / 1e9)
    assert any("copy tokens for their 8 experts" in line for line in without.warnings)
    assert not any("copy tokens" in line for line in known.warnings)


def test_what_does_not_copy_is_not_counted(tmp_path: Path) -> None:
    _, recipe, memory = case(tmp_path, 256, 64, 8, experts_implementation="llamamoe_sorted")
    assert copied_bytes(recipe, memory.run) == 0
    assert planned(recipe, tmp_path, 1).moved == {"copies": 0, "exchanged": 0}


@pytest.mark.parametrize(("k", "pays"), [(8, True), (16, False)])
def test_expert_parallelism_that_sends_more_than_it_saves_is_told(k: int, pays: bool, tmp_path: Path) -> None:
    _, recipe, memory = case(tmp_path, 256, 64, k, batch_size=4, distributed={"fsdp_size": 4, "ep_size": 4})
    rows = TOKENS * k
    assert exchanged_bytes(recipe, memory.run) == 4 * rows * 256 * 2 * 3 // 4  # there and back, three of four rows
    assert gathered_bytes(recipe, memory.run) == EXPERTS * 3 * 256 * 64 * (2 + 2 + 4) * 3 // 4
    found = planned(recipe, tmp_path, 4)
    assert found.moved["exchanged"] == exchanged_bytes(recipe, memory.run)
    assert any("FSDP2 alone" in line for line in found.warnings) == (not pays)
