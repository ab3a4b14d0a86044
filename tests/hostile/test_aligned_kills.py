"""Conversions that learn through the whole model, killed and interrupted at many points: the same bytes after ``--resume``."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from .conftest import Convert, content

GIVEN = {
    "num_experts": 4, "top_k": 2, "method": "cluster_shared", "shared": 40, "router": "ridge", "repair": "none",
    "target": "qwen2_moe", "calibration_tokens": 320, "calibration_length": 32, "device": "cpu",
    "align": {"tokens": 1024, "length": 32, "batch": 256, "refresh": 1, "checks": 2},
}  # fmt: skip
Whole = tuple[Path, dict[str, Any], dict[str, Any], dict[str, int]]


@pytest.fixture(scope="module")
def whole(convert: Convert, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An uninterrupted conversion: source, recipe, content of the output, and how often each function was called."""
    folder = tmp_path_factory.mktemp("whole")
    source = Path(shutil.copytree(pristine, folder / "dense"))
    (folder / "text.txt").write_text("the cat sat on a mat, and it rained in May. " * 60)
    given = GIVEN | {"calibration": str(folder / "text.txt")}
    found = convert(source, folder / "out", given=given)
    assert found["error"] is None, found
    assert found["calls"]["align"] == 3
    return source, given, content(folder / "out"), found["calls"]


def finish(convert: Convert, whole: Whole, out: Path) -> dict[str, int]:
    """Resume, compare with the uninterrupted run, and return what was called."""
    source, given, expected, _ = whole
    found = convert(source, out, resume=True, given=given)
    assert found["error"] is None, found
    assert content(out) == expected
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    calls: dict[str, int] = found["calls"]
    return calls


POINTS = [("text", 2), ("append", 3), ("first layers", 1), ("first layers", 2), ("align", 1), ("align", 3), ("append", 5),
          ("convert", 2), *(("replace", count) for count in range(3, 13))]  # fmt: skip
"""The renames: ids and facts of both texts, starts, states and the result, each before its hash, and the states of layers."""


@pytest.mark.parametrize(("name", "count"), POINTS)
def test_kill(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    source, given, _, _ = whole
    at = (name, count, signal.SIGKILL)
    assert convert(source, tmp_path / "out", at, given=given)["signal"] == signal.SIGKILL, f"{at} was never reached"
    finish(convert, whole, tmp_path / "out")


@pytest.mark.parametrize(("name", "count"), [("text", 2), ("first layers", 1), ("align", 2), ("replace", 8)])
def test_interrupt(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    found = convert(whole[0], tmp_path / "out", (name, count, signal.SIGINT), given=whole[1])
    assert found["error"] is not None
    assert found["error"][1] == 130
    finish(convert, whole, tmp_path / "out")


def test_sampled_text_is_not_sampled_again(convert: Convert, whole: Whole, tmp_path: Path) -> None:
    given = whole[1] | {"calibration": "auto"}
    assert convert(whole[0], tmp_path / "one", given=given)["error"] is None
    assert convert(whole[0], tmp_path / "out", ("align", 2, signal.SIGKILL), given=given)["signal"] == signal.SIGKILL
    found = convert(whole[0], tmp_path / "out", resume=True, given=given)
    assert "text" not in found["calls"]
    assert content(tmp_path / "out") == content(tmp_path / "one")
