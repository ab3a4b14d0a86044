"""Healing killed at many points, and shared by processes: the bytes are those of one run that nothing stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llamamoe
from llamamoe.healing.heal import heal
from llamamoe.healing.recipe import HealRecipe
from tests.healing import conftest as healing
from tests.healing.common import heal_recipe, receipt

from .dying import ROOT, run_jobs

text, dense, model = healing.text, healing.dense, healing.model
"""Fixtures."""


def job_of(model: Path, out: Path, dense: Path, recipe: HealRecipe, at: Any = None, **keys: Any) -> dict[str, Any]:
    data = recipe.model_dump(mode="json")
    return {"args": [str(model), str(out)], "parent": str(dense), "given": data, "keys": keys, "at": at}


def same(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    for name in names:
        if name == "llamamoe_heal.json":
            assert {k: v for k, v in receipt(one).items() if k != "run"} == {
                k: v for k, v in receipt(two).items() if k != "run"
            }
        else:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("inputs", ["parent", "model"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, dense: Path, text: Path, inputs: str
) -> None:
    recipe = heal_recipe(text, inputs=inputs)
    points = [["append", 3], ["loss", 14], ["pwrite", 9], ["write_text", 2], ["publish", 1]]
    points = points if inputs == "parent" else points[1:2]
    jobs = [job_of(model, tmp_path / "whole", dense, recipe)]
    for i, at in enumerate(points):
        jobs.append(job_of(model, tmp_path / str(i), dense, recipe, at))
        jobs.append(job_of(model, tmp_path / str(i), dense, recipe, resume=True))
    codes = run_jobs("killable_heal", jobs)
    assert codes == [0] + [-9, 0] * len(points)
    for i in range(len(points)):
        same(tmp_path / str(i), tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_write_what_one_does(tmp_path: Path, model: Path, dense: Path, text: Path) -> None:
    recipe = heal_recipe(text)
    assert run_jobs("killable_heal", [job_of(model, tmp_path / "one", dense, recipe)]) == [0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.hostile.killable_heal"]
    line = json.dumps(job_of(model, tmp_path / "two", dense, recipe)) + "\n"
    runs = []
    for rank in range(2):
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2", "RANK": str(rank),
                            "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        runs.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                cwd=ROOT,
            )
        )  # fmt: skip
        assert runs[-1].stdin is not None
        runs[-1].stdin.write(line)
        runs[-1].stdin.close()
        runs[-1].stdin = None
    for run in runs:
        out, err = run.communicate()
        assert out.split() == ["0"], err
    assert receipt(tmp_path / "two")["run"]["processes"] == 2
    same(tmp_path / "one", tmp_path / "two")


def test_another_recipe_cannot_finish_it(tmp_path: Path, model: Path, dense: Path, text: Path) -> None:
    assert run_jobs("killable_heal", [job_of(model, tmp_path / "out", dense, heal_recipe(text), ["layer", 2])]) == [-9]
    with pytest.raises(llamamoe.RefusedError, match="left from a run"):
        heal(model, tmp_path / "out", heal_recipe(text), parent=dense)
    with pytest.raises(llamamoe.RefusedError, match="started with another recipe, so"):
        heal(model, tmp_path / "out", heal_recipe(text, lr=0.01), parent=dense, resume=True)
    heal(model, tmp_path / "out", heal_recipe(text, lr=0.01), parent=dense, force=True)
