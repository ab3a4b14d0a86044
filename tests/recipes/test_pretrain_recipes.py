"""Every shipped recipe of pretraining is complete and runs two steps, shrunk by ``--set``."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamamoe import pretrain
from llamamoe.training.recipe import load_pretrain_recipe
from tests.training.runs import lines_of, make_world

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "pretrain").glob("*.yaml"))
SHRUNK = [
    "steps=2", "tokens=null", "batch_size=4", "micro_batch_size=2", "data.block_length=16", "data.mixture=uniform",
    "data.validation_blocks=2", "distributed.fsdp_size=1", "distributed.dp_replicate_size=1", "device=cpu", "precision.compute=float32",
    "trainer={}", "evaluate_every=1", "save_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_two_steps(path: Path, world: dict[str, str], tmp_path: Path) -> None:
    plain = load_pretrain_recipe(path)
    places = [f"data.train={world['train']}", f"data.validation={world['validation']}"]
    given = {"model": world["model"], "parent": world["parent"] if plain.parent else None}
    recipe = load_pretrain_recipe(path, given=given, overrides=[*SHRUNK, *places])
    result = pretrain(recipe, tmp_path / "run")
    assert result.steps == 2
    [*_, last] = lines_of(tmp_path / "run")
    assert last["kind"] == "validation"
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert {each.name for each in recipe.losses} == {each.name for each in plain.losses}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_head_of_a_recipe_says_how_to_run_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"pretrain --recipe {path.stem}" in head
    assert all(line.startswith("#") for line in head.splitlines())
