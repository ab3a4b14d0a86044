"""The folder of a stopped run, damaged at random: going on is refused, or ends with the bytes that it would have had."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamamoe import pretrain
from llamamoe.errors import LlamaMoeError
from llamamoe.training.ownership import MARKER, manifest_of, run_id
from llamamoe.training.run_folder import complete
from tests.training.runs import lines_of, make_world, recipe_of

SEEDS = 2
MUTATIONS = 30
"""Of each seed."""
OF_THE_RUN = ("recipe.yaml", "metrics.jsonl", "facts.json", "llamamoe_run.json", ".lock")
VALUES = (None, True, -1, 0, 1, 3, 2**70, 1e300, "", "x", [], {}, [[]])
OVERRIDES = ("steps=4", "save_every=2", "evaluate_every=2")


def run_folders(rng: random.Random, run: Path) -> str:
    """Damage a run's folder in place.

    Args:
        rng: Decides what is done.
        run: The folder; it holds a checkpoint.

    Returns:
        What was done; it begins with the name of the file or folder that it was done to.
    """
    checkpoint = rng.choice(sorted(run.glob("checkpoint-*")))
    if rng.random() < 0.1:
        return _to_the_folder(rng, checkpoint)
    inside = rng.random() < 0.75
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    path = rng.choice(files) if inside else run / rng.choice(OF_THE_RUN)
    acts = [_flip, _flip, _cut, _longer, _delete, _folder, _link, _empty]
    if path.suffix == ".json":
        acts += [_value, _value, _value, _value]
    if inside:
        acts += [lambda rng, path: _swap(path, rng.choice(files))]
    done = rng.choice(acts)(rng, path)
    return f"{path.relative_to(run)}: {done}"


def _flip(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing"
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at}"


def _cut(rng: random.Random, path: Path) -> str:
    keep = rng.randrange(path.stat().st_size + 1)
    path.write_bytes(path.read_bytes()[:keep])
    return f"cut to {keep} bytes"


def _longer(rng: random.Random, path: Path) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 9)))
    return "longer"


def _empty(rng: random.Random, path: Path) -> str:
    path.write_bytes(b"")
    return "empty"


def _delete(rng: random.Random, path: Path) -> str:
    path.unlink()
    return "deleted"


def _folder(rng: random.Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def _link(rng: random.Random, path: Path) -> str:
    path.symlink_to(path.rename(path.with_name(f".moved-{path.name}")).name)
    return "a link"


def _swap(path: Path, other: Path) -> str:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
    return f"swapped with {other.name}"


def _value(rng: random.Random, path: Path) -> str:
    """Another value in the place of one, wherever it stands."""
    data = json.loads(path.read_text())
    holder: Any = {"": data}
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and (key == "" or rng.random() < 0.9):
        holder = holder[key]
        key = rng.choice(sorted(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    before, holder[key] = holder[key], rng.choice(VALUES)
    path.write_text(json.dumps(data))
    return f"{key} = {str(before)[:40]!r} to {holder[key]!r}"


def _to_the_folder(rng: random.Random, checkpoint: Path) -> str:
    name, kind = checkpoint.name, rng.choice(("gone", "renamed", "link", "file", "empty", "copied", "more"))
    elsewhere = checkpoint.parent / "elsewhere"
    if kind == "copied":
        shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-9"))
    elif kind == "more":
        (checkpoint / "notes").write_text("mine")
    elif kind == "renamed":
        checkpoint.rename(checkpoint.with_name(f"checkpoint-{rng.choice(('0', '3', '10000000000000000000000', 'x'))}"))
    elif kind == "gone":
        shutil.rmtree(checkpoint)
    else:
        checkpoint.rename(elsewhere)
        {"link": lambda: checkpoint.symlink_to(elsewhere), "file": checkpoint.touch, "empty": checkpoint.mkdir}[kind]()
    return f"{name}: {kind}"


# ---- what must hold -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(recipe_of(world, *OVERRIDES), out)
    return out


@pytest.fixture(scope="module")
def stopped(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after its third step; tests work on copies."""
    out = tmp_path_factory.mktemp("stopped") / "run"

    def stop(progress: Any) -> None:
        if progress.stage == "train" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe_of(world, *OVERRIDES), out, progress=stop)
    return out


def judge(world: dict[str, str], run: Path, whole: Path) -> str:
    """Return how resuming ended: refused, or with the same bytes; raise if otherwise."""
    try:
        pretrain(recipe_of(world, *OVERRIDES), run, resume=True)
    except LlamaMoeError as error:
        return str(error)
    for name in (
        "model/model.safetensors",
        "checkpoint-4/model.safetensors",
        "checkpoint-4/optimizer/rank-00000.safetensors",
    ):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    return ""


@pytest.mark.parametrize("seed", range(SEEDS))
def test_going_on_is_refused_or_ends_with_the_same_bytes(
    seed: int, world: dict[str, str], stopped: Path, whole: Path, tmp_path: Path
) -> None:
    refused = 0
    for number in range(MUTATIONS):
        rng, run = random.Random(f"{seed}/{number}"), tmp_path / str(number)
        shutil.copytree(stopped, run, symlinks=True)
        done = run_folders(rng, run)
        try:
            told = judge(world, run, whole)
        except BaseException as error:
            raise AssertionError(f"{seed}/{number}: {done}") from error
        if told:
            refused += 1
        elif not done.startswith("metrics.jsonl"):  # earlier lines of which nothing else tells
            assert lines_of(run) == lines_of(whole), done
        shutil.rmtree(run)
    assert refused > MUTATIONS // 2


@pytest.mark.parametrize("act", [_flip, _cut, _longer, _delete, _folder, _link, _empty])
def test_no_file_of_a_checkpoint_can_be_damaged_without_a_refusal(
    act: Callable[[random.Random, Path], str], world: dict[str, str], stopped: Path, whole: Path, tmp_path: Path
) -> None:
    for path in sorted(path for path in (stopped / "checkpoint-2").rglob("*") if path.is_file()):
        rng, name = random.Random(path.name), path.relative_to(stopped)
        run = Path(shutil.copytree(stopped, tmp_path / "run"))
        done = act(rng, run / name)
        told = judge(world, run, whole)
        if path.name != "llamamoe_complete.json" or act not in (_flip, _cut):  # of which the last byte is a line's end
            assert "checkpoint-2" in told, f"{name}: {done}: {told}"
        shutil.rmtree(run)


@pytest.mark.parametrize("name", ["optimizer/rank-00000.safetensors", "schedule.json", "llamamoe_training.json"])
def test_a_state_of_something_else_with_a_manifest_that_fits_is_one_error(
    name: str, world: dict[str, str], stopped: Path, whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    checkpoint = run / "checkpoint-2"
    facts = manifest_of(checkpoint, run_id(run)).facts
    if name.endswith(".json"):
        (checkpoint / name).write_text("{}")
    else:
        torch.save({"a": 1}, checkpoint / name)
    (checkpoint / MARKER).unlink()
    complete(checkpoint, facts)
    assert "checkpoint-2" in judge(world, run, whole)
