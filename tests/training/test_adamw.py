"""AdamW on shards: torch's own where nothing is rounded; in bfloat16 the same on average, in fewer bytes."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Shard

from benchmarks.meters import CpuMeter
from llamamoe import pretrain
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.training.adamw import CompactAdamW, ShardAdamW, round_stochastically
from llamamoe.training.estimate.memory import StepMemory
from llamamoe.training.estimate.shapes import read_shape
from llamamoe.training.estimate.sharding import Sharding
from llamamoe.training.model import load_model

from .runs import lines_of, recipe_of

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def weights(dtype: torch.dtype = torch.float32, rows: int = 300) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((0.02 * torch.randn(rows, 64, generator=draw)).to(dtype)) for _ in range(2)]


def descend(optimizer: Any, steps: int, begin: int = 0) -> None:
    """Steps on random gradients whose mean is not zero."""
    for step in range(begin, begin + steps):
        draw = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for each in group["params"]:
                each.grad = (torch.randn(each.shape, generator=draw) + 0.5).to(each.dtype)
        optimizer.step()


def moments(optimizer: Any) -> list[torch.Tensor]:
    return [each[key] for each in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("value", [1 + 2.0**-9, -3.1e-5, 0.0, 1.5, 3e38])
def test_rounding_keeps_the_mean_and_takes_a_neighbour(value: float) -> None:
    values, out = torch.full((200_000,), value), torch.empty(200_000, dtype=torch.bfloat16)
    round_stochastically(values, out, torch.Generator().manual_seed(0))
    exact = float(values[0])
    found = out.unique().double()
    assert len(found) <= 2
    assert all(abs(float(each) - exact) <= 2.0**-7 * abs(exact) for each in found)
    assert float(out.double().mean()) == pytest.approx(exact, rel=1e-5)


def test_without_rounding_it_is_torch_s() -> None:
    ours, theirs = weights(), weights()
    descend(ShardAdamW([{"params": ours}], **OPTIONS), 3)
    descend(torch.optim.AdamW([{"params": theirs}], **OPTIONS), 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_moments_in_bfloat16_are_half_as_large_and_step_as_far() -> None:
    ours, theirs = weights(), weights()
    small = CompactAdamW([{"params": ours}], moments=torch.bfloat16, **OPTIONS)
    large = ShardAdamW([{"params": theirs}], **OPTIONS)
    descend(small, 30)
    descend(large, 30)
    assert 2 * sum(each.nbytes for each in moments(small)) == sum(each.nbytes for each in moments(large))
    start = weights()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert float((a - b).norm() / (b - before).norm()) < 0.02
    for a, b in zip(moments(small), moments(large), strict=True):
        assert float(a.double().mean()) == pytest.approx(float(b.double().mean()), rel=1e-3)


def test_a_second_moment_that_decays_slowly_still_moves() -> None:
    """At beta2 = 0.999 a step is below the spacing of bfloat16: rounding to the nearest would stop it."""
    slow = {**OPTIONS, "betas": (0.9, 0.999)}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        optimizer = CompactAdamW([{"params": weights()}], moments=dtype, **slow)
        descend(optimizer, 60)
        found.append(float(moments(optimizer)[1].double().mean()))
    assert found[0] == pytest.approx(found[1], rel=5e-3)


@pytest.mark.parametrize("lr", [2e-5, 5e-5])
def test_weights_in_bfloat16_move_as_far_as_in_float32(lr: float) -> None:
    """Over 30 steps, of weights that rounding to the nearest leaves where they are."""
    moved = {}
    for name, dtype, compact in (("float32", torch.float32, False), ("nearest", torch.bfloat16, False),
                                 ("stochastic", torch.bfloat16, True)):  # fmt: skip
        learned = weights(dtype)
        before = torch.cat([each.detach().double().flatten() for each in learned])
        kind = CompactAdamW if compact else ShardAdamW
        descend(kind([{"params": learned}], **{**OPTIONS, "lr": lr}), 30)
        moved[name] = float((torch.cat([each.detach().double().flatten() for each in learned]) - before).mean())
    assert moved["stochastic"] == pytest.approx(moved["float32"], rel=0.05)
    assert abs(moved["nearest"]) < 0.7 * abs(moved["float32"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_loaded_goes_on_exactly(dtype: torch.dtype) -> None:
    options = {**OPTIONS, "moments": torch.bfloat16, "seed": 3}
    whole, first = weights(dtype), weights(dtype)
    descend(CompactAdamW([{"params": whole}], **options), 4)
    before = CompactAdamW([{"params": first}], **options)
    descend(before, 2)
    after = CompactAdamW([{"params": first}], **options)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert {each.dtype for each in moments(after)} == {torch.bfloat16}
    descend(after, 2, begin=2)
    assert all(torch.equal(a, b) for a, b in zip(first, whole, strict=True))


@pytest.mark.parametrize("compact", [False, True])
def test_shards_of_several_meshes_and_whole_tensors_are_one_call(compact: bool, tmp_path: Path) -> None:
    """Of one rank, whose shards are everything; the tests of ranks cut them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        meshes = [DeviceMesh("cpu", torch.arange(1), mesh_dim_names=(name,)) for name in ("fsdp", "ep")]
        plain, learned = weights(), weights()
        parts = [
            DTensor.from_local(each.detach(), mesh, [Shard(0)]) for each, mesh in zip(learned, meshes, strict=True)
        ]
        cut = [torch.nn.Parameter(each) for each in parts]
        extra, theirs = weights()[0], weights()[0]
        kind: Any = partial(CompactAdamW, moments=torch.bfloat16) if compact else ShardAdamW
        ours = kind([{"params": [*cut, extra]}], **OPTIONS)
        whole = kind([{"params": [*plain, theirs]}], **OPTIONS)
        for step in range(3):
            for a, b in zip([*cut, extra], [*plain, theirs], strict=True):
                b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(step))
                a.grad = b.grad.clone()
                if isinstance(a, DTensor):
                    a.grad = DTensor.from_local(b.grad.clone(), a.device_mesh, a.placements)
            ours.step()
            whole.step()
        assert all(torch.equal(a.to_local(), b) for a, b in zip(cut, plain, strict=True))
        assert torch.equal(extra, theirs)
    finally:
        torch.distributed.destroy_process_group()


SMALL: dict[str, dict[str, Any]] = {
    "moments": {"precision": {"compute": "float32", "parent": "float32", "moments": "bfloat16"}},
    "all": {
        "precision": {"parameters": "bfloat16", "compute": "bfloat16", "parent": "float32", "rounding": "stochastic"}
    },
}


@pytest.mark.parametrize("case", SMALL)
def test_a_run_learns_as_in_float32_and_goes_on_exactly(case: str, world: dict[str, str], tmp_path: Path) -> None:
    pretrain(recipe_of(world), tmp_path / "wide")
    recipe = recipe_of(world, **SMALL[case])
    pretrain(recipe, tmp_path / "whole")
    losses = {}
    for name in ("wide", "whole"):
        lines = [line["loss"] for line in lines_of(tmp_path / name) if line["kind"] == "validation"]
        losses[name] = lines[-1] - lines[0]
    assert losses["whole"] == pytest.approx(losses["wide"], rel=0.1)
    pretrain(recipe, tmp_path / "half")
    for later in ("checkpoint-6", "model"):
        shutil.rmtree(tmp_path / "half" / later)
    pretrain(recipe, tmp_path / "half", resume=True)
    assert lines_of(tmp_path / "half") == lines_of(tmp_path / "whole")
    file = Path("model", "model.safetensors")
    assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("case", SMALL)
def test_the_estimate_counts_the_step(case: str, world: dict[str, str]) -> None:
    """Moments at rest, and what a step needs beside them."""
    recipe = recipe_of(world, **SMALL[case])
    checkpoint = SafetensorsCheckpoint(Path(world["model"]))
    memory = StepMemory(recipe, read_shape(checkpoint.config, checkpoint.tensors), Sharding())
    model = load_model(Path(world["model"]), recipe, "cpu")
    dtype = getattr(torch, recipe.precision.moments or recipe.precision.parameters)
    optimizer = CompactAdamW([{"params": list(model.parameters())}], moments=dtype, **OPTIONS)
    descend(optimizer, 1)
    assert memory.state()["moments"] == sum(each.nbytes for each in moments(optimizer))
    with CpuMeter() as meter:
        meter.begin()
        optimizer.step()
        meter.mark()
    assert memory.moments()["optimiser step"]["working space"] == pytest.approx(meter.peak, rel=0.1)
