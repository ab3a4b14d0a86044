"""Training killed at many points, and again and again: weights and metrics are those of one run that nothing stopped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llamamoe.training.run_folder import checkpoints
from tests.training.runs import lines_of, make_world, recipe_of

from .dying import run_jobs

STEPS, MICRO_BATCHES = 6, 2

IN_A_SAVE = [
    ["optimizer", 3],
    ["state", 2],
    ["marker", 2],
    ["rotate", 2],
    ["metrics", 5],
    ["finish", 1],
    ["rename", 1],
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


def test_killed_inside_a_save_it_goes_on_to_the_same_bytes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    jobs = [
        each
        for i, at in enumerate(IN_A_SAVE)
        for each in (job(recipe, tmp_path / str(i), at, resume=False), job(recipe, tmp_path / str(i)))
    ]
    assert run_jobs("killable_pretrain", jobs) == [-9, 0] * len(IN_A_SAVE)
    for i in range(len(IN_A_SAVE)):
        assert_same(tmp_path / str(i), whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps_again_and_again(seed: int, recipe: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    jobs = [job(recipe, tmp_path / "run", ["micro_batch", rng.randrange(1, 9)], resume=i > 0) for i in range(4)]
    codes = run_jobs("killable_pretrain", [*jobs, job(recipe, tmp_path / "run")])
    assert codes[0] == -9
    assert codes[-1] == 0
    assert set(codes) <= {-9, 0}
    assert_same(tmp_path / "run", whole)
