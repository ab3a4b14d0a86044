"""Conversions that learn through the whole model, killed and interrupted at many points: the same bytes after ``--resume``."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Convert
from .stopped import Whole, check_interrupt, check_sampled_once, finish, kill, run_whole

GIVEN = {
    "num_experts": 4, "top_k": 2, "method": "cluster_shared", "shared": 40, "router": "ridge", "repair": "none",
    "target": "qwen2_moe", "calibration_tokens": 320, "calibration_length": 32, "device": "cpu",
    "align": {"tokens": 1024, "length": 32, "batch": 256, "refresh": 1, "checks": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(convert: Convert, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    found = run_whole(convert, pristine, tmp_path_factory.mktemp("whole"), GIVEN, 60)
    assert found[3]["align"] == 3
    return found


POINTS = [("text", 2), ("append", 3), ("first layers", 1), ("first layers", 2), ("align", 1), ("align", 3), ("append", 5),
          ("convert", 2), *(("replace", count) for count in range(3, 13))]  # fmt: skip
"""The renames: ids and facts of both texts, starts, states and the result, each before its hash, and the states of layers."""


@pytest.mark.parametrize(("name", "count"), POINTS)
def test_kill(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    kill(convert, whole, tmp_path / "out", (name, count))
    finish(convert, whole, tmp_path / "out")


@pytest.mark.parametrize(("name", "count"), [("text", 2), ("first layers", 1), ("align", 2), ("replace", 8)])
def test_interrupt(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    check_interrupt(convert, whole, tmp_path / "out", (name, count))


def test_sampled_text_is_not_sampled_again(convert: Convert, whole: Whole, tmp_path: Path) -> None:
    check_sampled_once(convert, whole, tmp_path, ("align", 2))
