"""The record of a resumed run is that of its start."""

from __future__ import annotations

import os
from typing import Any

import pytest

from llamamoe.training.tracking import same_tracked_run


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
