"""Shared parts of tests that kill and interrupt conversions: an uninterrupted one, and checks after a stop."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

from .conftest import Convert, content

Whole = tuple[Path, dict[str, Any], dict[str, Any], dict[str, int]]
"""Source, recipe, content of the output, and how often each function was called."""
Point = tuple[str, int]
"""Name of a function, and at which of its calls."""


def run_whole(convert: Convert, pristine: Path, folder: Path, given: dict[str, Any], repeats: int) -> Whole:
    """An uninterrupted conversion, calibrated on a sentence that is said ``repeats`` times."""
    source = Path(shutil.copytree(pristine, folder / "dense"))
    (folder / "text.txt").write_text("the cat sat on a mat, and it rained in May. " * repeats)
    given = given | {"calibration": str(folder / "text.txt")}
    found = convert(source, folder / "out", given=given)
    assert found["error"] is None, found
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


def kill(convert: Convert, whole: Whole, out: Path, point: Point) -> None:
    """Kill a conversion at a point, which must be reached."""
    at = (*point, signal.SIGKILL)
    assert convert(whole[0], out, at, given=whole[1])["signal"] == signal.SIGKILL, f"{at} was never reached"


def check_interrupt(convert: Convert, whole: Whole, out: Path, point: Point) -> None:
    """Ctrl-C at a point ends with its exit code, and the run goes on."""
    found = convert(whole[0], out, (*point, signal.SIGINT), given=whole[1])
    assert found["error"] is not None
    assert found["error"][1] == 130
    finish(convert, whole, out)


def check_sampled_once(convert: Convert, whole: Whole, folder: Path, point: Point) -> None:
    """A run that is killed goes on with the text that it sampled."""
    sampling = (whole[0], whole[1] | {"calibration": "auto"}, whole[2], whole[3])
    assert convert(sampling[0], folder / "one", given=sampling[1])["error"] is None
    kill(convert, sampling, folder / "out", point)
    found = convert(sampling[0], folder / "out", resume=True, given=sampling[1])
    assert "text" not in found["calls"]
    assert content(folder / "out") == content(folder / "one")
