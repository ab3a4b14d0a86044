"""Numbers that no command can work with are refused by the option's or key's name, before anything is read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result

from .conftest import Run, make_tokens


@pytest.mark.parametrize("size", ["0GB", "0.0 GB", "-1GB", "1e9GB", "5", ""])
def test_sizes_of_files(size: str, converted: tuple[Path, Result], dense: Path, tmp_path: Path, run: Run) -> None:
    assert "GB" in run("densify", converted[0], tmp_path / "out", "--shard-size", size, code=2).stderr
    assert "shard-size" in run("split", dense, "--dry-run", "--shard-size", size, code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--device-memory", "--peak-tflops", "--memory-bandwidth"])
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
    assert "seeds.0: must be greater than or equal to 0 (got -1)" in said
    assert "constrained" not in said
    assert "invalid batch sizes [0]" in run("bench", dense, "--batch-sizes", "0", code=2).stderr
    assert "not a list of whole numbers" in run("bench", dense, "--batch-sizes", "1,x", code=2).stderr
    both = (converted[0], converted[0], "--out", tmp_path / "out")
    assert "invalid weights [nan, 1.0]" in run("merge", *both, "--weights", "nan,1", code=2).stderr
    assert "neither a list of numbers" in run("merge", *both, "--weights", "a,b", code=2).stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("evaluate", "--text", "t", "--max-tokens", "1"), "--max-tokens is 1, but must be at least 2"),
        (("evaluate", "--text", "t", "--context-length", "1"), "--context-length is 1, but"),
        (("bench", "--prompt", "1"), "--prompt is 1, but must be at least 2"),
        (("report", "--text", "t", "--oracle-tokens", "-1"), "--oracle-tokens is -1, but"),
        (("split", "--dry-run", "--experts", "4", "--top-k", "5"), "Error: --top-k = 5 must not exceed --experts = 4"),
        (("split", "--dry-run", "--top-k", "20"), "must not exceed num_experts = 8, its default: give num_experts"),
        (("split", "--dry-run", "--experts", "9999"), "Error: --experts: must be"),
        (("split", "--dry-run", "--experts", "0", "--seed", "-1"), "invalid values:\n  - --experts: must"),
        (
            ("split", "--dry-run", "--experts", "0", "--set", "seed=-1"),
            "the recipe is not valid:\n  - --experts: must",
        ),
        (("split", "--dry-run", "--calibration-weights", "a=0"), "Error: --calibration-weights: all are zero"),
        (("split", "--dry-run", "--set", "num_experts=9999"), "  - num_experts: must be"),
        (("split", "--dry-run", "--experts", "2", "--top-k", "1", "--shared", "500"), "--shared = 500 means"),
        (("split", "--dry-run", "--set", "shared=500"), "shared = 500 means"),
        (("split", "--dry-run", "--calibration", "t", "--align-tokens", "1k"), "--align-tokens: must be"),
    ],
)
def test_an_error_names_what_gave_the_value(
    command: tuple[str, ...], said: str, dense: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag, or the key of the recipe."""
    monkeypatch.chdir(tmp_path)
    Path("t").write_text("the cat sat on the mat", encoding="utf-8")
    code = 3 if "500" in said else 2
    error = run(command[0], dense, *command[1:], code=code).stderr
    assert said in error
    assert "----" not in error


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("65536", 65536),
        ("64k", 64_000),
        ("8e3", 8000),
        ("6.4e4", 64_000),
        ("1M", 1_000_000),
        ("1.5M", 1_500_000),
        ("64Ki", 65_536),
        ("2Mi", 2**21),
    ],
)
def test_numbers_of_tokens_have_units_in_flags_and_recipes(
    text: str, number: int, dense: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat" * 20, encoding="utf-8")
    (tmp_path / "r.yaml").write_text(f"calibration_tokens: {text}", encoding="utf-8")
    common = ("split", dense, "--dry-run", "--json", "--calibration", tmp_path / "t.txt", "--calibration-length", "16")
    for given in (
        ("--calibration-tokens", text),
        ("--set", f"calibration_tokens={text}"),
        ("--recipe", tmp_path / "r.yaml"),
    ):
        found = json.loads(run(*common, *given).stdout)
        assert found["recipe"]["calibration_tokens"] == number


@pytest.mark.parametrize("text", ["64K", "1.0005k", "k", "-5k", "1e-4", "1.23e1", "8 k", "0x10"])
def test_numbers_of_tokens_that_are_not_clear_are_refused(text: str, dense: Path, run: Run) -> None:
    common = ("split", dense, "--dry-run", "--calibration", "t")
    assert "64k (64,000)" in run(*common, "--calibration-tokens", text, code=2).stderr
    assert "calibration_tokens: " in run(*common, "--set", f"calibration_tokens={text}", code=2).stderr
