"""Calibrated conversions killed at many points: ``--resume`` goes on from the kept hidden states to the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Convert, content, digests
from .stopped import Whole, check_interrupt, check_sampled_once, finish, kill, run_whole

LAYERS = 2
GIVEN = {
    "num_experts": 4, "top_k": 2, "method": "cluster_shared", "shared": 40, "shared_by": "power", "router": "ridge",
    "repair": "least_squares", "repair_passes": 2, "target": "qwen2_moe", "calibration_tokens": 320,
    "calibration_length": 32, "device": "cpu", "shard_size": "200KB",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(convert: Convert, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    found = run_whole(convert, pristine, tmp_path_factory.mktemp("whole"), GIVEN, 20)
    assert found[3]["enter"] == LAYERS
    assert found[3]["leave"] == found[3]["save"] == LAYERS - 1, "nothing follows the last layer"
    return found


POINTS = [
    ("text", 1), ("enter", 1), ("enter", 2), ("layer", 1), ("layer", 2), ("leave", 1), ("save", 1), ("append", 2),
    ("append", 3), ("append", 4), ("append", 5), ("write_text", 1), ("write_text", 2), ("write_text", 3),
    ("replace", 2), ("replace", 3), ("pwrite", 1), ("pwrite", -1), ("finish", -1), ("convert", 2), ("convert", -1),
    ("rmtree", 1), ("publish", 1), ("rename", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count"), POINTS)
def test_kill(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    source, _, _, calls = whole
    before = digests(source)
    kill(convert, whole, tmp_path / "out", (name, count if count > 0 else calls[name] + 1 + count))
    finish(convert, whole, tmp_path / "out")
    assert digests(source) == before


@pytest.mark.parametrize(("name", "count"), [("enter", 2), ("layer", 1), ("text", 1), ("rmtree", 1)])
def test_interrupt(convert: Convert, whole: Whole, tmp_path: Path, name: str, count: int) -> None:
    check_interrupt(convert, whole, tmp_path / "out", (name, count))


# ---- what a kill leaves, made by hand ------------------------------------------------------------------------------


@pytest.fixture
def stopped(convert: Convert, whole: Whole, tmp_path: Path) -> Path:
    """OUT of a run killed after its first layer was finished."""
    kill(convert, whole, tmp_path / "out", ("layer", LAYERS))
    return tmp_path / "out"


def states(out: Path) -> Path:
    return out.with_name("out.partial") / ".calibration"


def test_finished_layers_are_not_walked_through_again(convert: Convert, whole: Whole, stopped: Path) -> None:
    calls = finish(convert, whole, stopped)
    assert calls["layer"] == calls["enter"] == 1
    assert "text" not in calls


@pytest.mark.parametrize("file", ["residual.1", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "bytes", "nested"])
def test_lost_states_are_computed_again(
    convert: Convert,
    whole: Whole,
    stopped: Path,
    file: str,
    damage: str,
) -> None:
    path = states(stopped) / file
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "nested":
        path.write_bytes(b"[" * 100_000)
    elif damage == "bytes":
        data[-9] ^= 1
        path.write_bytes(data)
    calls = finish(convert, whole, stopped)
    assert calls["layer"] == LAYERS


def test_without_any_state_the_walk_begins_again(convert: Convert, whole: Whole, stopped: Path) -> None:
    shutil.rmtree(states(stopped))
    assert finish(convert, whole, stopped)["text"] == 1


@pytest.mark.parametrize("file", ["ids.npy", "text.json"])
def test_text_is_read_again_if_what_was_kept_is_damaged(
    convert: Convert,
    whole: Whole,
    stopped: Path,
    file: str,
) -> None:
    data = bytearray((states(stopped) / file).read_bytes())
    data[-9] ^= 1
    (states(stopped) / file).write_bytes(data[: len(data) // 2] if file == "text.json" else data)
    assert finish(convert, whole, stopped)["text"] == 1


def test_another_text_cannot_take_its_place(
    convert: Convert,
    whole: Whole,
    stopped: Path,
    tmp_path: Path,
) -> None:
    source, given, _, _ = whole
    text = Path(given["calibration"])
    was = text.read_text()
    shutil.rmtree(states(stopped))
    try:
        text.write_text("another text altogether, and not what it was before. " * 20)
        name, code, message = convert(source, stopped, resume=True, given=given)["error"]
    finally:
        text.write_text(was)
    assert (name, code) == ("RefusedError", 3)
    assert "differs from the one that the stopped run began with" in message
    finish(convert, whole, stopped)


def test_a_damaged_layer_is_mended(convert: Convert, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill(convert, whole, out, ("rmtree", 1))
    for file in sorted(out.with_name("out.partial").glob("*.safetensors"))[:2]:
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(bytes(data))
    finish(convert, whole, out)


def test_force_drops_the_states(convert: Convert, whole: Whole, stopped: Path) -> None:
    found = convert(whole[0], stopped, force=True, given=whole[1])
    assert found["error"] is None
    assert content(stopped) == whole[2]
    assert json.loads((stopped / "llamamoe_receipt.json").read_text())["calibration"]["tokens"] == 320


def test_sampled_text_is_not_sampled_again(convert: Convert, whole: Whole, tmp_path: Path) -> None:
    check_sampled_once(convert, whole, tmp_path, ("layer", 2))
