"""The record of a resumed run is that of its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llamamoe import pretrain
from llamamoe.training.tracking import same_tracked_run
from tests.training.runs import make_world, recipe_of


def seen() -> tuple[str | None, str | None]:
    return os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_RESUME")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("wandb", ("abc", "allow")),
        (["tensorboard", "wandb"], ("abc", "allow")),
        ("none", (None, None)),
        (None, (None, None)),
    ],
)
def test_the_id_of_the_folder_is_that_of_the_record(report_to: Any, expected: tuple[str | None, str | None]) -> None:
    with same_tracked_run(report_to, "abc"):
        assert seen() == expected
    assert seen() == (None, None)


def test_an_id_of_the_user_s_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with same_tracked_run("wandb", "abc"):
        assert seen() == ("mine", None)
    assert seen() == ("mine", None)


def test_weights_and_biases_gives_both_parts_of_a_run_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for key, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    world = make_world(tmp_path)
    for steps in (2, 4):
        pretrain(
            recipe_of(world, f"steps={steps}", "trainer={report_to: wandb}"),
            tmp_path / "run",
            resume=steps > 2,
            extend=steps > 2,
        )
        wandb.finish()
    records = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(records) == 2
    assert len(set(records)) == 1
