"""``llamamoe tokenize``: what it prints, its JSON, its errors; a dry run imports nothing heavy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokens import make_model, make_text

from .conftest import Run


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    folder = tmp_path_factory.mktemp("cli")
    make_text(folder / "text")
    (folder / "text" / "odd.jsonl").write_text('{"text": "fine"}\nnot json\n')
    model = make_model(folder / "model")
    return ["tokenize", "--recipe", "small", "--tokenizer", model, "--text", folder / "text", "--workers", "1"]


def test_table_warnings_and_json(args: list[str | Path], tmp_path: Path, run: Run) -> None:
    result = run(*args, "--out", tmp_path / "out", "--set", "validation.share=0.2")
    for expected in ("uint16", "documents", "bytes per token", "a (validation)", "4 input files in"):
        assert expected in result.stdout
    assert "odd.jsonl:2: the line is not JSON" in result.stderr
    assert "tokenize:" in result.stderr
    data = json.loads(run(*args, "--out", tmp_path / "two", "--set", "validation=null", "--json").stdout)
    assert data["splits"]["train"]["odd"] == {
        "documents": 1, "tokens": 5, "text_bytes": 4, "largest_id": 81, "shards": 1
    }  # fmt: skip
    assert (data["bad_rows"]["total"], data["units"], data["kept"], data["dtype"]) == (1, 4, 0, "uint16")
    assert run(*args, "--out", tmp_path / "three", "-q").stdout == ""


def test_dry_run(args: list[str | Path], tmp_path: Path, run: Run) -> None:
    text = run(*args, "--out", tmp_path / "out", "--dry-run", "-v").stdout
    for expected in ("4 files", "odd.jsonl", "tokens", "disk", "Nothing was written"):
        assert expected in text
    data = json.loads(run(*args, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert (data["units"], data["workers"], len(data["files"])) == (4, 1, 4)
    assert data["bytes"] == sum(file["bytes"] for file in data["files"])
    assert not list(tmp_path.iterdir())


def test_dry_run_imports_nothing_heavy(args: list[str | Path]) -> None:
    line = [str(arg) for arg in args] + ["--dry-run"]
    script = (
        "import sys\nfrom llamamoe_cli.main import root\n"
        f"try: root.main({line!r}, prog_name='llamamoe')\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'datatrove'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_strict_then_resume(args: list[str | Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    stderr = run(*args, "--out", out, "--strict", code=1).stderr
    assert "odd.jsonl:2: the line is not JSON" in stderr
    assert "--resume finishes it; --force starts again" in run(*args, "--out", out, code=3).stderr
    finished = run(*args, "--out", out, "--resume")
    assert "of 4 units reused" in finished.stdout
    assert re.search(r"(?m)^resume: [1-3] of 4 units kept$", finished.stderr)
    assert "is not empty" in run(*args, "--out", out, "--resume", code=3).stderr


def test_errors(args: list[str | Path], tmp_path: Path, run: Run) -> None:
    assert "Did you mean 'shard_tokens'" in run(*args, "--set", "shard_token=3", code=2).stderr
    assert "Did you mean 'small'" in run("tokenize", "--recipe", "smal", code=2).stderr
    assert "matches" in run(*args, "--text", tmp_path / "none.jsonl", code=2).stderr
    assert "does not exist" in run(*args, "--tokenizer", tmp_path / "none", code=3).stderr
    assert "are mutually exclusive" in run(*args, "--resume", "--force", code=2).stderr
    assert "Missing option '--recipe'" in run("tokenize", code=2).stderr
