"""Commands that write a checkpoint from others, killed at many points: resumed, the bytes are those of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamoe import load_recipe, split
from llamamoe.checkpoint.out_folder import DERIVED_FILE
from tests.dense import make_dense

from .dying import run_jobs

POINTS = (("pwrite", 3), ("append", 2), ("write_text", 2), ("publish", 1))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: make_dense(folder / name, seed=seed) for seed, name in enumerate(("base", "other"))}
    given = {"num_experts": 4, "top_k": 2, "method": "random", "target": "mixtral"}
    return made | {"mixture": split(made["base"], folder / "mixture", load_recipe(given=given), verify=False).out}


def content(out: Path) -> dict[str, Any]:
    """All files, without what a run records of itself."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    receipt = json.loads(found.pop(DERIVED_FILE))
    return found | {"receipt": {key: value for key, value in receipt.items() if key != "run"}}


@pytest.mark.parametrize("verb", ["mix", "resplit", "retop"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(verb: str, models: dict[str, Path], tmp_path: Path) -> None:
    sources = {"mix": ("base", "base", "other")}.get(verb, ("mixture",))

    def job(name: str, at: Any = None, **keys: Any) -> dict[str, Any]:
        first, *more = (str(models[each]) for each in sources)
        return {"verb": verb, "args": [first, str(tmp_path / name), *more], "keys": keys, "at": at}

    jobs = [job("whole")]
    for at in POINTS:
        jobs += [job(at[0], at), job(at[0], resume=True)]
    assert run_jobs("killable_transforms", jobs) == [0] + [-9, 0] * len(POINTS)
    for name, _ in POINTS:
        assert content(tmp_path / name) == content(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
