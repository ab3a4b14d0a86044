"""A small dense checkpoint to break, and the rule that every refusal keeps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import llamamoe
from llamamoe.errors import LlamaMoeError
from tests.dense import make_dense

Edit = Callable[[dict[str, Any]], object]
Refused = Callable[..., LlamaMoeError]
Convert = Callable[..., dict[str, Any]]
RECEIPT = "llamamoe_receipt.json"
GIVEN = {"num_experts": 4, "top_k": 2, "method": "kmeans", "target": "qwen2_moe", "shared": 40, "shard_size": "200KB"}
SMALL = {"method": "random", "num_experts": 4, "top_k": 2}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint that every test copies; nobody writes to it."""
    return make_dense(tmp_path_factory.mktemp("pristine") / "dense")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(pristine, tmp_path / "dense"))


@pytest.fixture
def sharded(source: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    return shard(source)


def recipe(**given: Any) -> llamamoe.SplitRecipe:
    return llamamoe.load_recipe(given=SMALL | given)


def digests(folder: Path) -> dict[str, str]:
    """Relative path to SHA-256 (or the target of a link) of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def edit_config(folder: Path, change: Edit | None = None, **keys: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | keys
    if change is not None:
        change(config)
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Edit) -> None:
    """Change the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path, parts: int = 2) -> Path:
    """Put the tensors of a single-file checkpoint into several files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        names = sorted(tensors)[i::parts]
        save_file({n: tensors[n] for n in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Convert and expect one clear error: the words in it, the exit code, nothing written, the source untouched."""

    def check(source: Path, *words: str, code: int = 3, out: Path | None = None, **given: Any) -> LlamaMoeError:
        target = out or tmp_path / "out"
        keys = {k: given.pop(k) for k in ("force", "resume", "verify", "progress") if k in given}
        before = digests(source) if source.is_dir() else None
        around = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(LlamaMoeError) as caught:
            llamamoe.split(source, target, recipe(**given), **keys)
        assert type(caught.value).exit_code == code, caught.value
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
        assert len(str(caught.value)) < 2000, "an error is read by people"
        assert sorted(p.name for p in tmp_path.iterdir()) == around, "something was written"
        if before is not None:
            assert digests(source) == before, "the source was touched"
        return caught.value

    return check


@pytest.fixture(scope="module")
def convert() -> Iterator[Convert]:
    """Run a conversion in a process of its own, which may be killed."""
    script = Path(__file__).with_name("killable.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(script.parents[2])}
    server = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def call(source: Path, out: Path, at: tuple[str, int, int] | None = None, **keys: Any) -> dict[str, Any]:
        given = keys.pop("given", GIVEN)
        job = {"args": [str(source), str(out), given], "keys": {"verify": False} | keys, "at": at}
        server.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        answer: dict[str, Any] = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        return answer

    yield call
    server.stdin.close()
    server.wait(timeout=30)


def content(folder: Path) -> dict[str, Any]:
    """Hashes of all files, and the receipt without what differs from run to run."""
    receipt = json.loads((folder / RECEIPT).read_text())
    receipt.pop("run")
    return digests(folder) | {RECEIPT: receipt}
