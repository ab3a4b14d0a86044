"""Training killed at many points, and again and again: weights and metrics are those of one run that nothing stopped."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llamamoe.training.ownership import named_checkpoints
from llamamoe.training.recipe import load_pretrain_recipe
from llamamoe.training.run_folder import checkpoints
from tests.training.runs import lines_of, make_world, recipe_of, start

from .dying import run_jobs

STEPS, MICRO_BATCHES = 6, 2

IN_A_SAVE = [
    ["config", 1],
    ["file", 3],
    ["tensor", 100],
    ["written", 4],
    ["state", 2],
    ["marker", 2],
    ["rotate", 2],
    ["metrics", 5],
    ["finish", 1],
    ["rename", 3],
    ["model", 1],
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned noise, balance, the parent's predictions, a mixture that moves, and few checkpoints kept."""
    folder = tmp_path_factory.mktemp("world")
    found = recipe_of(
        make_world(folder),
        "data.update=sheared_llama",
        "data.reference_losses={large: 3.0, small: 1.0}",
        "evaluate_every=2",
        "keep=1",
        gate="noisy_top_k",
        losses=[{"name": "cv_squared"}, {"name": "z"}],
        distill={"kl": {"weight": {"start": 1.0, "end": 0.0, "share": 0.5}}},
    )
    (folder / "recipe.yaml").write_text(found.to_yaml())
    return folder / "recipe.yaml"


def job(recipe: Path, out: Path, at: Any = None, *, resume: bool = True) -> dict[str, Any]:
    return {"recipe": str(recipe), "out": str(out), "at": at, "resume": resume}


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    out = recipe.parent / "whole"
    assert run_jobs("killable_pretrain", [job(recipe, out, resume=False)]) == [0]
    return out


def assert_same(out: Path, whole: Path) -> None:
    assert lines_of(out) == lines_of(whole)
    for name in ("model/model.safetensors", "checkpoint-6/llamamoe_gate.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in checkpoints(out)} == {path.name for path in checkpoints(whole)}
    assert not list(out.glob("*.partial"))


def assert_same_after_kills(recipe: Path, points: Sequence[list[Any]], whole: Path, folder: Path) -> None:
    """Kill a run at each of the points and resume it."""
    jobs = [
        each
        for i, at in enumerate(points)
        for each in (job(recipe, folder / str(i), at, resume=False), job(recipe, folder / str(i)))
    ]
    assert run_jobs("killable_pretrain", jobs) == [-9, 0] * len(points)
    for i in range(len(points)):
        assert_same(folder / str(i), whole)


def test_killed_inside_a_save_it_goes_on_to_the_same_bytes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    assert_same_after_kills(recipe, IN_A_SAVE, whole, tmp_path)


def test_killed_while_a_checkpoint_is_written_in_the_background(recipe: Path, whole: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside.yaml"
    beside.write_text(load_pretrain_recipe(recipe, overrides=["save_in_background=true"]).to_yaml())
    points: list[list[Any]] = [
        ["tensor", 100],
        ["marker", 2],
        ["rename", 3],
        ["rotate", 2],
    ]
    assert_same_after_kills(beside, points, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "at"),
    [
        (1, ["file", 1]),
        (1, ["tensor", 30]),
        (1, ["written", 4]),
        (0, ["tensor", 100]),
        (0, ["index", 2]),
        (0, ["marker", 2]),
        (0, ["rename", 3]),
    ],
)
def test_a_rank_killed_inside_a_save_leaves_the_last_whole_checkpoint(
    rank: int, at: list[Any], recipe: Path, sharded: Path, tmp_path: Path
) -> None:
    """Whatever the ranks have written by then; all of them start again and end with the same bytes."""
    out = tmp_path / "run"
    killed = start(sharded.with_suffix(".yaml"), out, processes=2, die=(rank, at))
    assert killed.wait() == -signal.SIGKILL, killed.log.read_text()
    assert checkpoints(out) == named_checkpoints(out), "what has its name is whole"
    again = start(sharded.with_suffix(".yaml"), out, "--resume", processes=2)
    told, _ = again.communicate()
    assert again.returncode == 0, told
    assert_same(out, sharded)


@pytest.fixture(scope="module")
def sharded(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, sharded over two processes; its recipe is beside it."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    found = load_pretrain_recipe(recipe, overrides=["distributed.fsdp_size=2"])
    out.with_suffix(".yaml").write_text(found.to_yaml())
    told, _ = (process := start(out.with_suffix(".yaml"), out, processes=2)).communicate()
    assert process.returncode == 0, told
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps_again_and_again(seed: int, recipe: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    jobs = [job(recipe, tmp_path / "run", ["micro_batch", rng.randrange(1, 9)], resume=i > 0) for i in range(4)]
    codes = run_jobs("killable_pretrain", [*jobs, job(recipe, tmp_path / "run")])
    assert codes[0] == -9
    assert codes[-1] == 0
    assert set(codes) <= {-9, 0}
    assert_same(tmp_path / "run", whole)
