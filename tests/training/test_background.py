"""Checkpoints that are written while training continues: the same bytes, and no error is lost."""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llamamoe import plan_pretraining, pretrain
from llamamoe.checkpoint import tensor_file
from llamamoe.errors import LlamaMoeError, UsageError
from llamamoe.progress import Progress
from llamamoe.training import shards
from llamamoe.training.run_folder import checkpoints

from ..hostile.conftest import digests
from .runs import lines_of, recipe_of

TIMED = ("llamamoe_complete.json", "trainer_state.json")
"""Files that hold times, or hashes of files that do."""


def recipe(world: dict[str, str], *overrides: str) -> Any:
    return recipe_of(world, "save_in_background=true", *overrides, gate="noisy_top_k", losses=[{"name": "switch"}])


@pytest.fixture(scope="module")
def plain(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run that waits for each checkpoint."""
    out = tmp_path_factory.mktemp("plain") / "run"
    pretrain(recipe(world, "save_in_background=false"), out)
    return out


def files(checkpoint: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(checkpoint).items() if name not in TIMED}


def test_a_checkpoint_holds_what_was_at_its_step(
    world: dict[str, str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is written only after another step has changed weights and moments."""
    passed: dict[int, threading.Event] = defaultdict(threading.Event)
    passed[6].set()  # the last one
    write = shards.write_tensors

    def late(path: Path, *args: Any) -> Any:
        step = int(next(part for part in path.parts if part.startswith("checkpoint-")).partition("-")[2])
        passed[step].wait()
        return write(path, *args)

    def progress(done: Progress) -> None:
        if done.stage == "train" and done.done > 0:
            passed[done.done - 1].set()

    monkeypatch.setattr(shards, "write_tensors", late)
    pretrain(recipe(world), tmp_path / "run", progress=progress)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        assert files(tmp_path / "run" / name) == files(plain / name), name
    assert lines_of(tmp_path / "run") == lines_of(plain)


@pytest.mark.parametrize("step", [2, 6], ids=["at the next save", "at the end"])
def test_a_failure_ends_the_run_with_the_name_of_the_file(
    step: int, world: dict[str, str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing = tensor_file.replacing

    @contextmanager
    def full(target: Path) -> Iterator[Any]:
        with replacing(target) as file:
            yield file
            if target.parent.parent.name == f"checkpoint-{step}":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(tensor_file, "replacing", full)
    told = rf"checkpoint-{step} cannot be written: No space left on device \(optimizer/rank-00000.safetensors\)\. "
    told += "The last good checkpoint is checkpoint-4" if step > 2 else "No checkpoint was written before it"
    with pytest.raises(LlamaMoeError, match=told):
        pretrain(recipe(world), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == (
        [] if step == 2 else ["checkpoint-2", "checkpoint-4"]
    )
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    pretrain(recipe(world), tmp_path / "run", resume=True)
    assert files(tmp_path / "run" / "checkpoint-6") == files(plain / "checkpoint-6")


def test_older_checkpoints_are_deleted_and_the_way_of_saving_may_change(
    world: dict[str, str], plain: Path, tmp_path: Path
) -> None:
    pretrain(recipe(world, "keep=1", "evaluate_every=null"), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    plan = plan_pretraining(recipe(world, "save_in_background=false"), out=plain, resume=True)
    assert not [line for line in plan.warnings if "continues with" in line]


def test_deepspeed_writes_its_own(world: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"save_in_background cannot be combined with trainer\.deepspeed"):
        recipe(world, "trainer.deepspeed=zero.json")
