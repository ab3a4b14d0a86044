"""Numbers that no command can work with are refused by the option's or key's name, before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result

from .conftest import Run, make_tokens


@pytest.mark.parametrize("size", ["0GB", "0.0 GB", "-1GB", "1e9GB", "5", ""])
def test_sizes_of_files(size: str, converted: tuple[Path, Result], dense: Path, tmp_path: Path, run: Run) -> None:
    assert "GB" in run("densify", converted[0], tmp_path / "out", "--shard-size", size, code=2).stderr
    assert "shard-size" in run("split", dense, "--dry-run", "--shard-size", size, code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--device-memory", "--peak-tflops"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_what_a_device_has(
    option: str, value: str, dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run
) -> None:
    tokens, text = tmp_path / "tokens", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 50, encoding="utf-8")
    make_tokens(run, dense, text, tokens)
    said = run(
        "pretrain", "--recipe", "stories260k", "--model", converted[0], "--parent", dense, "--dry-run", "--set",
        f"data.train={tokens}", "--set", "data.validation=null", "--set", "data.block_length=32", option, value, code=2,
    ).stderr  # fmt: skip
    assert "must be a finite number above 0" in said


def test_lists_and_alternatives_are_told_without_the_words_of_libraries(
    dense: Path, converted: tuple[Path, Result], tmp_path: Path, run: Run
) -> None:
    said = run("compare", dense, "--recipe", "quick", "--dry-run", "--set", "seeds=[-1]", code=2).stderr
    assert "seeds.0: Input should be greater than or equal to 0 (got -1)" in said
    assert "constrained" not in said
    assert "invalid batch sizes [0]" in run("bench", dense, "--batch-sizes", "0", code=2).stderr
    assert "not a list of whole numbers" in run("bench", dense, "--batch-sizes", "1,x", code=2).stderr
    both = (converted[0], converted[0], "--out", tmp_path / "out")
    assert "invalid weights [nan, 1.0]" in run("merge", *both, "--weights", "nan,1", code=2).stderr
    assert "not a list of numbers" in run("merge", *both, "--weights", "a,b", code=2).stderr
