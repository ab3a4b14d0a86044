"""Real processes killed at many points: the source is untouched, and ``--resume`` ends at the same bytes."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

import llamamoe
from llamamoe.checkpoint.ledger import LEDGER
from llamamoe.errors import RefusedError

from .conftest import GIVEN, Convert, content, digests, edit_config, recipe, shard

Whole = tuple[Path, dict[str, str], dict[str, int]]


@pytest.fixture(scope="module")
def whole(convert: Convert, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An uninterrupted conversion: its source, content, and how often each function was called."""
    folder = tmp_path_factory.mktemp("whole")
    source = shard(Path(shutil.copytree(pristine, folder / "dense")), 3)
    found = convert(source, folder / "out")
    assert found["error"] is None
    assert (folder / "out" / "model.safetensors.index.json").is_file()
    return source, content(folder / "out"), found["calls"]


def check(convert: Convert, whole: Whole, out: Path, at: tuple[str, int, int]) -> None:
    """Kill, look, resume, compare."""
    source, expected, _ = whole
    before = digests(source)
    found = convert(source, out, at)
    if at[2] == signal.SIGKILL:
        assert found["signal"] == signal.SIGKILL, f"{at} was never reached"
    else:
        assert found["error"] is None or found["error"][1] == 130, found
    assert digests(source) == before
    if out.exists():  # whole, or not there at all
        assert content(out) == expected
        return
    found = convert(source, out, resume=True)
    assert found["error"] is None, found
    assert content(out) == expected
    assert digests(source) == before
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name]


POINTS = [
    ("append", 1), ("append", 2), ("append", 3), ("layer", 1), ("layer", 2), ("pwrite", 1), ("pwrite", 9),
    ("fdatasync", 1), ("fdatasync", -1), ("finish", -1), ("convert", 1), ("convert", -1), ("write_text", 3),
    ("write_text", 1), ("replace", 1), ("write_text", -1), ("replace", -1), ("publish", 1), ("fsync", -2),
    ("unlink", 1), ("rename", 1), ("fsync", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count"), POINTS)
def test_kill(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    total = whole[2][name]
    check(convert, whole, tmp_path / "out", (name, count if count > 0 else total + 1 + count, signal.SIGKILL))


@pytest.mark.parametrize("point", random.Random(7).sample(range(1, 60), 8))
def test_kill_anywhere(convert: Convert, whole: Whole, tmp_path: Path, point: int) -> None:
    check(convert, whole, tmp_path / "out", ("pwrite", 1 + point % whole[2]["pwrite"], signal.SIGKILL))


@pytest.mark.parametrize(
    ("name", "count"),
    [("pwrite", 5), ("append", 2), ("layer", 2), ("write_text", 2), ("fsync", -2)],
)
def test_interrupt(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    total = whole[2][name]
    check(convert, whole, tmp_path / "out", (name, count if count > 0 else total + 1 + count, signal.SIGINT))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_while_it_verifies(convert: Convert, whole: Whole, tmp_path: Path, number: int) -> None:
    source, expected, _ = whole
    convert(source, tmp_path / "out", ("check neurons", 1, number), verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert convert(source, tmp_path / "out", resume=True)["error"] is None
    assert content(tmp_path / "out") == expected


def test_killed_again_and_again(convert: Convert, whole: Whole, tmp_path: Path) -> None:
    source, expected, _ = whole
    out = tmp_path / "out"
    convert(source, out, ("append", 2, signal.SIGKILL))
    for at in (("pwrite", 6), ("layer", 1), ("append", 1), ("write_text", 1), ("unlink", 1)):
        assert convert(source, out, (*at, signal.SIGKILL), resume=True)["signal"] == signal.SIGKILL
    assert convert(source, out, resume=True)["error"] is None
    assert content(out) == expected


def test_force_killed_while_replacing(convert: Convert, whole: Whole, tmp_path: Path) -> None:
    source, expected, _ = whole
    out = tmp_path / "out"
    assert convert(source, out)["error"] is None
    old = digests(out)
    assert convert(source, out, ("rename", 2, signal.SIGKILL), force=True)["signal"] == signal.SIGKILL
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".out.llamamoe-replaced", "out.partial"]
    assert digests(tmp_path / left[0]) == old, "the old conversion was only moved aside"
    assert "not empty" in convert(source, out, resume=True)["error"][2]
    assert digests(out) == old, "and comes back"
    assert convert(source, out, resume=True, force=True)["error"] is None
    assert content(out) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- what a kill leaves, made by hand ------------------------------------------------------------------------------


@pytest.fixture
def stopped(convert: Convert, whole: Whole, tmp_path: Path) -> Path:
    """OUT of a run killed after all its units were finished."""
    assert convert(whole[0], tmp_path / "out", ("write_text", 1, signal.SIGKILL))["signal"] == signal.SIGKILL
    return tmp_path / "out"


def ledger(out: Path) -> Path:
    return out.with_name("out.partial") / LEDGER


def test_finished_units_are_not_done_again(convert: Convert, whole: Whole, stopped: Path) -> None:
    found = convert(whole[0], stopped, resume=True)
    assert "layer" not in found["calls"]
    assert found["calls"]["convert"] == whole[2]["convert"]


@pytest.mark.parametrize("damage", ["bytes", "header", "cut", "gone", "longer"])
def test_damaged_shards_are_mended(convert: Convert, whole: Whole, stopped: Path, damage: str) -> None:
    file = sorted(stopped.with_name("out.partial").glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    if damage == "bytes":
        data[-100] ^= 1
    elif damage == "header":
        data[:50] = b"x" * 50
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "longer":
        data += b"tail"
    file.write_bytes(bytes(data))
    if damage == "gone":
        file.unlink()
    assert convert(whole[0], stopped, resume=True)["error"] is None
    assert content(stopped) == whole[1]


def test_half_a_line_is_cut_off(convert: Convert, whole: Whole, stopped: Path) -> None:
    text = ledger(stopped).read_text()
    ledger(stopped).write_text(text[: len(text) - 30])
    assert convert(whole[0], stopped, resume=True)["error"] is None
    assert content(stopped) == whole[1]


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[]", b"5", b'{"unit": 5}', b'{"unit": "outer"}', b'{"unit": "outer", "sha256": [], "info": {}}',
             b'{"unit": "outer", "sha256": {"a": 1}, "info": {}}', b"\xff\xfe\x00", b"[" * 100_000, b""]
)  # fmt: skip
def test_damaged_ledger_is_refused(convert: Convert, whole: Whole, stopped: Path, line: bytes) -> None:
    lines = ledger(stopped).read_bytes().splitlines()
    lines[1] = line
    ledger(stopped).write_bytes(b"\n".join(lines) + b"\n")
    before = digests(stopped.with_name("out.partial"))
    name, code, text = convert(whole[0], stopped, resume=True)["error"]
    assert (name, code) == ("RefusedError", 3)
    assert "is damaged" in text or "was started with another" in text
    assert "--force" in text
    assert digests(stopped.with_name("out.partial")) == before


def test_force_starts_again(convert: Convert, whole: Whole, stopped: Path) -> None:
    ledger(stopped).write_bytes(b"\xff nonsense\n")
    assert convert(whole[0], stopped, force=True)["error"] is None
    assert content(stopped) == whole[1]


def test_left_over_without_resume_is_refused(convert: Convert, whole: Whole, stopped: Path) -> None:
    name, code, text = convert(whole[0], stopped)["error"]
    assert (name, code) == ("RefusedError", 3)
    assert "--resume finishes it; --force starts again" in text


@pytest.mark.parametrize("change", ["recipe", "source", "config"])
def test_resume_with_something_else_is_refused(
    convert: Convert, whole: Whole, stopped: Path, tmp_path: Path, change: str
) -> None:
    source, given = Path(shutil.copytree(whole[0], tmp_path / "copy", copy_function=shutil.copy2)), GIVEN
    if change == "recipe":
        given = {**GIVEN, "seed": 1}
    elif change == "source":
        os.utime(next(source.glob("*.safetensors")))
    else:
        edit_config(source, rms_norm_eps=1e-4)
    before = digests(stopped.with_name("out.partial"))
    name, code, text = convert(source, stopped, resume=True, given=given)["error"]
    assert (name, code) == ("RefusedError", 3)
    assert f"was started with another {'recipe' if change == 'recipe' else 'source'}, so it cannot be finished" in text
    assert "--force" in text
    assert digests(stopped.with_name("out.partial")) == before


@pytest.mark.parametrize("keys", [{}, {"resume": True}, {"force": True}])
def test_two_processes_at_once(convert: Convert, whole: Whole, stopped: Path, keys: dict[str, bool]) -> None:
    with ledger(stopped).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = digests(stopped.with_name("out.partial"))
        name, code, text = convert(whole[0], stopped, **keys)["error"]
        assert (name, code) == ("RefusedError", 3)
        assert "another process is writing" in text
        assert digests(stopped.with_name("out.partial")) == before
    assert convert(whole[0], stopped, **(keys or {"resume": True}))["error"] is None


def test_resume_of_nothing_begins(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    llamamoe.split(source, tmp_path / "out", recipe(), resume=True, verify=False)
    with pytest.raises(RefusedError, match="not empty"):
        llamamoe.split(source, tmp_path / "out", recipe(), resume=True, verify=False)
