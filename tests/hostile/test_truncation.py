"""A file that is cut short in place while it is read is one error and an exit code, never SIGBUS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llamamoe
from tests.dense import make_dense
from tests.training.runs import make_world, recipe_of

from .dying import ROOT

FILE = "model.safetensors"
SPLIT = ("split", "{parent}", "{new}", "--method", "random", "--experts", "4", "--top-k", "2")
VERIFY = ("verify", "{out}", "--against", "{parent}")
EVALUATE = (
    "evaluate",
    "{out}",
    "--against",
    "{parent}",
    "--text",
    "{text}",
    "--device",
    "cpu",
    "--context-length",
    "16",
)
BENCH = ("bench", "{out}", "--batch-sizes", "1", "--prompt", "4", "--new-tokens", "2", "--device", "cpu")
PRETRAIN = ("pretrain", "--recipe", "{recipe}", "--model", "{out}", "--out", "{new}")

Cut = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent in float32 and one in bfloat16, their conversions, and what the commands need."""
    folder = tmp_path_factory.mktemp("world")
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2})
    for name in ("float32", "bfloat16"):
        dense = make_dense(folder / name / "parent", dtype=getattr(torch, name))
        llamamoe.split(dense, folder / name / "out", recipe, verify=False)
    (folder / "text.txt").write_text("".join(chr(32 + i * i % 90) for i in range(600)))
    (folder / "recipe.yaml").write_text(recipe_of(make_world(folder / "training"), "steps=1").to_yaml())
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.truncating"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, cwd=ROOT,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def cut(world: Path, server: subprocess.Popen[str], tmp_path: Path) -> Cut:
    """Run a command whose file is cut short at some point."""

    def run(args: tuple[str, ...], file: str, at: tuple[str, int], dtype: str = "float32") -> dict[str, Any]:
        shutil.copytree(world / dtype, tmp_path, dirs_exist_ok=True)
        given = {name: str(tmp_path / name) for name in ("parent", "out", "new")}
        given |= {"text": str(world / "text.txt"), "recipe": str(world / "recipe.yaml")}
        job = {"args": [each.format(**given) for each in args], "file": f"{file.format(**given)}/{FILE}", "at": at}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        found: dict[str, Any] = json.loads(server.stdout.readline())
        assert found["cut"], found["err"]
        return found

    return run


@pytest.mark.parametrize(
    ("args", "at", "dtype"),
    [
        (SPLIT, ("check neurons", 2), "float32"),
        (SPLIT, ("get_slice", 9), "bfloat16"),  # transformers looks at the parent
        (SPLIT, ("get_tensor", 12), "bfloat16"),  # accelerate reads a matrix of a later layer
        (SPLIT, ("run parent", 2), "float32"),  # the head is to come
        (VERIFY, ("get_slice", 1), "float32"),
        (VERIFY, ("get_tensor", 1), "bfloat16"),
        (VERIFY, ("run parent", 1), "float32"),
        (VERIFY, ("run with equal weights", 2), "float32"),  # everything was read
    ],
)
def test_a_parent_that_is_cut_while_it_is_verified(
    cut: Cut, args: tuple[str, ...], at: tuple[str, int], dtype: str, tmp_path: Path
) -> None:
    found = cut(args, "{parent}", at, dtype)
    assert found["exit"] == 1, found
    assert f"{tmp_path / 'parent' / FILE} changed while it was read" in found["err"].replace("\n", " ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("args", "at"),
    [
        (SPLIT, ("check neurons", 1)),
        (SPLIT, ("run parent", 1)),
        (VERIFY, ("run with equal weights", 1)),
        (VERIFY, ("run as stored", 2)),
    ],
)
def test_a_conversion_that_is_cut_while_it_is_verified(
    cut: Cut, args: tuple[str, ...], at: tuple[str, int], dtype: str, tmp_path: Path
) -> None:
    folder = "new.partial" if args == SPLIT else "out"
    found = cut(args, str(tmp_path / folder), at, dtype)
    assert found["exit"] == 1, found
    assert f"{tmp_path / folder / FILE} changed while it was read" in found["err"].replace("\n", " ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("args", "slices"), [(EVALUATE, 1), (BENCH, 9), (PRETRAIN, 9)])
def test_a_model_that_is_cut_while_it_is_loaded(cut: Cut, args: tuple[str, ...], slices: int, tmp_path: Path) -> None:
    found = cut(args, "{out}", ("get_slice", slices), "bfloat16")
    assert found["exit"] == 3, found
    assert f"{FILE} is empty (0 bytes)" in found["err"].replace("\n", " ")


@pytest.mark.parametrize(("args", "stage"), [(EVALUATE, "evaluate"), (BENCH, "bench")])
def test_a_model_that_was_loaded_needs_its_file_no_more(cut: Cut, args: tuple[str, ...], stage: str) -> None:
    assert cut(args, "{out}", (stage, 1))["exit"] == 0
