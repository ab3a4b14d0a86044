"""Going on with another recipe: what changes nothing is taken, the rest is refused by name or allowed and noted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llamamoe import plan_pretraining, pretrain
from llamamoe.errors import RefusedError
from llamamoe.training.changes import Changes

from .runs import BLOCK, lines_of, recipe_of

SWITCH: dict[str, Any] = {"losses": [{"name": "switch"}]}
CONSTANT = "lr_schedule.shape=constant"


@pytest.fixture(scope="module")
def run(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, a checkpoint after two."""
    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(recipe(world), out)
    return out


def recipe(world: dict[str, str], *overrides: str, **keys: Any) -> Any:
    return recipe_of(world, "steps=4", CONSTANT, *overrides, **keys)


def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines_of(out) if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("overrides", "rounding"),
    [
        (("gradient_checkpointing=true", "trainer.run_name=again", "keep=5", "log_every=1"), 0.0),
        (("validation_moved", "precision.save=bfloat16", "data.verify=false"), 0.0),
        (("micro_batch_size=2", "logits_at_once=256", "experts_implementation=eager"), 1e-5),
    ],
)
def test_what_decides_no_weight_may_change(
    overrides: tuple[str, ...], rounding: float, run: Path, world: dict[str, str], tmp_path: Path
) -> None:
    out, there = copied(run, tmp_path), dict(world)
    if "validation_moved" in overrides:
        overrides = overrides[1:]
        for key in ("model", "parent", "train", "validation"):
            there[key] = str(shutil.copytree(world[key], tmp_path / "moved" / key))
    pretrain(recipe(there, *overrides), out, resume="checkpoint-2")
    assert losses(out) == pytest.approx(losses(run), rel=rounding, abs=0)
    assert not [line for line in lines_of(out) if line["kind"] == "change"]


@pytest.mark.parametrize(
    ("overrides", "keys", "told"),
    [
        (("optimizer.lr=1e-3", "lr_schedule.warmup=1"), {}, "lr_schedule.warmup 0 -> 1, optimizer.lr 0.002 -> 0.001"),
        (("steps=3",), {}, r"steps 4 -> 3\.[\s\S]*--allow-change"),
        (("steps=null", "tokens=1024"), {}, r"steps 4 -> 8\.[\s\S]*--extend"),
        ((), SWITCH, r"losses \[\] -> \[.*switch"),
        (("seed=3",), {}, r"seed 0 -> 3\.[\s\S]*seed, which cannot change within a run.*data.skip_tokens=256"),
        (("data.mixture={large: 1, small: 3}",), {}, "data.mixture proportional"),
        (("freeze=[attention]", "optimizer.lr=1e-3"), {}, "Put back freeze, which cannot"),
    ],
)
def test_what_decides_weights_is_refused_by_name(
    overrides: tuple[str, ...], keys: dict[str, Any], told: str, run: Path, world: dict[str, str], tmp_path: Path
) -> None:
    out = copied(run, tmp_path)
    before = sorted(path.name for path in out.iterdir())
    other = recipe(world, *overrides, **keys)
    for attempt in (
        lambda: pretrain(other, out, resume="checkpoint-2"),
        lambda: plan_pretraining(other, out=out, resume="checkpoint-2"),
    ):
        with pytest.raises(RefusedError, match="made by another recipe") as found:
            attempt()
        text = f"{found.value.message}\n{found.value.hint}"
        assert re.search(told, text), text
    assert sorted(path.name for path in out.iterdir()) == before


def test_micro_batches_matter_where_a_loss_looks_at_one(world: dict[str, str]) -> None:
    one, two = (recipe(world, f"micro_batch_size={size}", **SWITCH) for size in (4, 2))
    assert dict(Changes.between(one, two, 2).values) == {"micro_batch_size": (4, 2)}
    noisy = [recipe(world, f"micro_batch_size={size}", gate="jitter") for size in (4, 2)]
    assert Changes.between(*noisy, 2)


def test_a_run_that_is_extended_is_the_longer_run(run: Path, world: dict[str, str], tmp_path: Path) -> None:
    out, longer = copied(run, tmp_path), recipe(world, "steps=6")
    pretrain(longer, tmp_path / "whole")
    pretrain(longer, out, resume=True, extend=True)
    assert losses(out) == losses(tmp_path / "whole")
    assert (out / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()
    [change] = [line for line in lines_of(out) if line["kind"] == "change"]
    assert change == {"step": 4, "kind": "change", "changed": {"steps": [4, 6]}}
    pretrain(longer, out, resume=True)  # it is that run from now on


def test_an_extension_says_what_becomes_of_the_learning_rate(world: dict[str, str]) -> None:
    four, eight = (recipe_of(world, f"steps={n}", "lr_schedule.min_ratio=0") for n in (4, 8))
    told = Changes.between(four, eight, 3).describe()
    assert "from 0.146 to 0.691 of its largest value" in told  # half cosines at 3/4 and 3/8


def test_an_allowed_change_has_its_effect_and_is_noted(
    run: Path, world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = copied(run, tmp_path)
    other = recipe(world, "optimizer.lr=5e-4", "optimizer.weight_decay=0.5")
    plan = plan_pretraining(other, out=out, resume="checkpoint-2", allow_change=True)
    assert [
        line for line in plan.warnings if "continues with optimizer.lr 0.002 -> 0.0005, optimizer.weight_decay" in line
    ]
    pretrain(other, out, resume="checkpoint-2", allow_change=True)
    [told] = [line for line in caplog.messages if "optimizer.lr 0.002" in line]
    assert told.startswith("from step 3 on")
    lines = lines_of(out)
    rates = [line["lr"]["rest"] for line in lines if line["kind"] == "train"]
    assert rates == [2e-3, 2e-3, 5e-4, 5e-4]
    assert losses(out)[:3] == losses(run)[:3]
    assert losses(out)[3] != losses(run)[3]
    [change] = [line for line in lines if line["kind"] == "change"]
    assert change["changed"] == {"optimizer.lr": [2e-3, 5e-4], "optimizer.weight_decay": [0.01, 0.5]}
    assert change["step"] == 2
    with pytest.raises(RefusedError, match="seed 0 -> 1"):
        pretrain(recipe(world, "seed=1"), out, resume=True, allow_change=True)


def test_a_new_run_goes_on_in_the_text(run: Path, world: dict[str, str], tmp_path: Path) -> None:
    """The first batch after a checkpoint's weights is the one that the old run had next, at the same loss."""
    seen = 2 * 8 * BLOCK
    for name, skip in (("on", seen), ("again", 0)):
        given = {"model": str(run / "checkpoint-2"), "data.skip_tokens": str(skip), "steps": "1"}
        pretrain(recipe(world, *(f"{key}={value}" for key, value in given.items())), tmp_path / name)
    assert losses(tmp_path / "on")[0] == pytest.approx(losses(run)[2], rel=1e-6)
    assert losses(tmp_path / "again")[0] != pytest.approx(losses(run)[2], rel=1e-3)
    state = json.loads((tmp_path / "on" / "checkpoint-1" / "llamamoe_training.json").read_text())["mixture"]
    assert sum(state["consumed"].values()) * BLOCK == seen + 8 * BLOCK
