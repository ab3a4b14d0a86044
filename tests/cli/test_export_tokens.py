"""``llamamoe export-tokens``: what it prints, its JSON, its errors."""

from __future__ import annotations

import json
from pathlib import Path

from llamamoe import tokenize
from tests.tokens import make_model, make_text, recipe

from .conftest import Run


def test_export_tokens(tmp_path: Path, run: Run) -> None:
    make_text(tmp_path / "text")
    tokenize(recipe(make_model(tmp_path / "model"), tmp_path / "text"), tmp_path / "tokens")
    text = run("export-tokens", tmp_path / "tokens", tmp_path / "out").stdout
    for expected in ("2 datasets, uint16", "train/a.bin", "train: --data-path", str(tmp_path / "out" / "train" / "b")):
        assert expected in text
    assert "exists and is not empty" in run("export-tokens", tmp_path / "tokens", tmp_path / "out", code=3).stderr
    assert "mutually exclusive" in run("export-tokens", "x", "y", "--resume", "--force", code=2).stderr
    assert "unknown" in run("export-tokens", tmp_path / "tokens", tmp_path / "two", "--format", "nemo", code=2).stderr
    data = json.loads(run("export-tokens", tmp_path / "tokens", tmp_path / "two", "--json").stdout)
    assert [each["documents"] for each in data["domains"]] == [51, 17]
    assert data["data_path"]["train"][1] == str(tmp_path / "two" / "train" / "a")
