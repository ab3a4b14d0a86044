"""A tiny dense model, its conversion, and a way to run commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from llamamoe_cli.main import root

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.dense import make_dense

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command line in this process."""

    def call(*args: str | Path, code: int = 0, **keys: object) -> Result:
        result = CliRunner().invoke(root, [str(a) for a in args], prog_name="llamamoe", **keys)  # type: ignore[arg-type]
        assert result.exit_code == code, f"{result.exit_code}\n{result.output}"
        return result

    return call


def process(*args: str | Path, **keys: object) -> subprocess.Popen[str]:
    """Start a command line in a process of its own."""
    command = [sys.executable, "-m", "llamamoe_cli", *map(str, args)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env} | keys
    return subprocess.Popen(command, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def converted(dense: Path, run: Run) -> tuple[Path, Result]:
    """A conversion through the command line, and what it printed."""
    out = dense.parent / "converted"
    return out, run("split", dense, out, "--method", "random", "--experts", "4", "--top-k", "2")


def make_tokens(run: Run, tokenizer: Path, text: Path, out: Path) -> None:
    """Tokenise a text, none of it held out."""
    run(
        "tokenize",
        "--recipe",
        "small",
        "--tokenizer",
        tokenizer,
        "--text",
        text,
        "--set",
        "validation=null",
        "--out",
        out,
    )
