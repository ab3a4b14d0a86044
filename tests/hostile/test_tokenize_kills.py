"""Tokenising killed at many points: OUT appears whole or not at all, and ``--resume`` ends at the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamamoe.checkpoint.ledger import LEDGER, Ledger
from llamamoe.data import token_merge
from llamamoe.data.tokenize import tokenize
from llamamoe.errors import LlamaMoeError, RefusedError
from tests.hostile.conftest import digests
from tests.tokens import make_model, make_text, recipe

KEYS = {"shard_tokens": 300, "validation": {"documents": 2}}
POINTS: dict[str, tuple[Any, str]] = {
    "append": (Ledger, "append"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "replace": (Path, "replace"),
    "unlink": (Path, "unlink"),
    "assemble": (token_merge, "_index"),
}
At = tuple[str, int] | None
Start = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_text(folder / "text")
    make_model(folder / "model")
    tokenize(recipe(folder / "model", folder / "text", **KEYS), folder / "warm")  # imports, once for all forks
    return folder


def watch(calls: Counter[str], at: At) -> None:
    for name, (holder, attribute) in POINTS.items():
        setattr(holder, attribute, killing(name, getattr(holder, attribute), calls, at))


def killing(name: str, real: Callable[..., Any], calls: Counter[str], at: At) -> Callable[..., Any]:
    def call(*args: Any, **keys: Any) -> Any:
        calls[name] += 1
        if at == (name, calls[name]):
            if name == "append":  # half a line reaches the disk
                args[0]._file.write(json.dumps(args[1])[:20])
                args[0]._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keys)

    return call


@pytest.fixture(scope="module")
def start(place: Path) -> Start:
    """Tokenise in a process of its own, killed at the n-th call of a function."""

    def run(out: Path, at: At = None, **keys: Any) -> dict[str, Any]:
        given = keys.pop("given", KEYS)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            calls: Counter[str] = Counter()
            watch(calls, at)
            error, kept = None, 0
            try:
                kept = tokenize(recipe(place / "model", place / "text", **given), out, **keys).kept
            except LlamaMoeError as found:
                error = [type(found).__name__, str(found)]
            os.write(write, json.dumps({"killed": False, "error": error, "kept": kept, "calls": calls}).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found: dict[str, Any] = json.loads(answer) if answer else {"killed": killed}
        return found

    return run


@pytest.fixture(scope="module")
def whole(start: Start, place: Path) -> tuple[dict[str, str], dict[str, int]]:
    found = start(place / "whole")
    assert found["error"] is None
    return digests(place / "whole"), found["calls"]


CASES = [("append", n) for n in (1, 2, 3, -1)] + [("fsync", n) for n in (1, 2, 9, -3, -2, -1)]
CASES += [("rename", 1), ("rename", 2), ("rename", -1), ("replace", 1), ("replace", 3), ("replace", -2)]
CASES += [("replace", -1), ("unlink", -1), ("assemble", 1)]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_kill(start: Start, whole: Any, tmp_path: Path, name: str, count: int) -> None:
    expected, calls = whole
    at = (name, count if count > 0 else calls[name] + 1 + count)
    assert start(tmp_path / "out", at)["killed"], f"{at} was never reached"
    out = tmp_path / "out"
    if out.exists():  # whole, but for the ledger that the last step removes
        assert {k: v for k, v in digests(out).items() if k != LEDGER} == expected
    found = start(out, resume=True)
    if found["error"] is not None:
        assert "not empty" in found["error"][1], "it was whole already"
    assert digests(out) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_again_and_again(start: Start, whole: Any, tmp_path: Path) -> None:
    expected, calls = whole
    rng, out, kills = random.Random(3), tmp_path / "out", 0
    start(out, ("append", 2))
    for _ in range(12):
        name = rng.choice(["fsync", "append", "replace", "rename"])
        found = start(out, (name, rng.randint(1, max(2, calls[name] // 6))), resume=True)
        kills += found["killed"]
        if not found["killed"]:
            break
    assert kills >= 3
    if not out.exists():
        assert start(out, resume=True)["error"] is None
    assert digests(out) == expected


def test_finished_units_are_kept_and_damaged_ones_done_again(start: Start, whole: Any, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial" / "work"
    start(out, ("assemble", 1))
    assert start(out, ("append", 1), resume=True) != {"killed": True}, "nothing is appended: all units are kept"
    assert digests(out) == whole[0]
    other = tmp_path / "other"
    start(other, ("assemble", 1))
    work = tmp_path / "other.partial" / "work"
    file = sorted((work / "000001").rglob("*.bin"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    found = start(other, resume=True)
    assert (found["error"], found["kept"]) == (None, 2)
    assert digests(other) == whole[0]


def test_a_resume_with_something_else_is_refused(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(out, ("rename", 3))
    before = digests(tmp_path)
    name, text = start(out, resume=True, given=KEYS | {"shard_tokens": 299})["error"]
    assert name == "RefusedError"
    assert "started with another source, recipe" in text
    assert start(out)["error"][0] == "RefusedError"
    assert digests(tmp_path) == before
    assert start(out, force=True)["error"] is None


def test_a_damaged_ledger_is_refused(start: Start, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(out, ("append", 3))
    ledger = tmp_path / "out.partial" / LEDGER
    ledger.write_bytes(b"nonsense\n" + ledger.read_bytes())
    with pytest.raises(RefusedError, match="is damaged"):
        tokenize(recipe(place / "model", place / "text", **KEYS), out, resume=True)


SCRIPT = """
import multiprocessing, os, signal, sys
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.data.tokenize import tokenize

def stop(step):
    if step.stage == "tokenize":
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    given = {"tokenizer": sys.argv[1], "text": sys.argv[2], "workers": 2, "shard_tokens": 300}
    tokenize(load_tokenize_recipe(given=given), sys.argv[3], progress=stop)
"""


def test_workers_end_with_the_process_that_started_them(place: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), place / "model", place / "text", tmp_path / "out"]
    # The workers hold stdout too: it ends when the last of them does.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2, "two workers were running"
    found = tokenize(recipe(place / "model", place / "text", shard_tokens=300), tmp_path / "out", resume=True)
    assert found.kept >= 1
