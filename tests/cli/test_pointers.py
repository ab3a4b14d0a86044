"""Git LFS pointers in the place of files are named as such by every command that reads the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import Result

from .conftest import Run, make_tokens

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 123456\n"
SIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat " * 200, encoding="utf-8")
    return path


def refused(run: Run, name: str, *args: str | Path) -> None:
    said = run(*args, code=3).stderr
    assert f"{name} is a Git LFS pointer" in said
    assert "git lfs pull" in said
    assert len(said.splitlines()) < 6


@pytest.mark.parametrize("name", [*SIDE, "model.safetensors"])
def test_in_a_parent(
    name: str, dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run
) -> None:
    folder, moe = shutil.copytree(dense, tmp_path / "parent"), converted[0]
    (folder / name).write_text(POINTER)
    small = ("--calibration", text, "--calibration-tokens", "512")
    for args in (
        ("inspect", folder),
        ("split", folder, "--dry-run"),
        ("budget", folder, *small),
        ("evaluate", folder, "--text", text),
        ("evaluate", moe, "--against", folder, "--text", text),
        ("bench", folder),
        ("report", moe, "--against", folder, "--text", text, "--json-out", tmp_path / "report.json"),
        ("compare", folder, "--recipe", "quick", "--dry-run", *small[:2], "--evaluation", text),
        ("heal", moe, "--parent", folder, "--text", text, "--dry-run"),
        ("verify", moe, "--against", folder),
        ("densify", moe, tmp_path / "out", "--like", folder),
    ):
        refused(run, name, *args)


@pytest.mark.parametrize("name", [*SIDE, "model.safetensors"])
def test_in_a_conversion(
    name: str, dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run
) -> None:
    folder = shutil.copytree(converted[0], tmp_path / "moe")
    (folder / name).write_text(POINTER)
    for args in (
        ("inspect", folder),
        ("evaluate", folder, "--text", text),
        ("report", folder, "--text", text, "--json-out", tmp_path / "report.json"),
        ("heal", folder, "--parent", dense, "--text", text, "--dry-run"),
        ("verify", folder, "--against", dense),
        ("densify", folder, tmp_path / "out"),
        ("merge", folder, converted[0], "--out", tmp_path / "out"),
    ):
        refused(run, name, *args)


@pytest.mark.parametrize("name", SIDE)
def test_beside_a_tokenizer(name: str, dense: Path, text: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(dense, tmp_path / "tokenizer")
    (folder / "model.safetensors").write_text(POINTER)  # which nobody asks for here
    args = ("tokenize", "--recipe", "small", "--tokenizer", folder, "--text", text, "--set", "validation=null")
    run(*args, "--out", tmp_path / "tokens")
    (folder / name).write_text(POINTER)
    refused(run, name, *args, "--out", tmp_path / "none")


def test_in_the_place_of_a_gguf_file(text: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_text(POINTER)
    for args in (("inspect", path), ("split", path, "--dry-run"), ("evaluate", path, "--text", text)):
        refused(run, path.name, *args)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("named", [True, False])
def test_among_texts(kind: str, named: bool, dense: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("the cat sat on the mat " * 200, encoding="utf-8")
    path = folder / f"bad.{kind}"
    path.write_text(POINTER)
    given = path if named else folder
    for args in (
        ("evaluate", dense, "--text", given),
        ("split", dense, "--calibration", given, "--dry-run"),
        ("tokenize", "--recipe", "small", "--tokenizer", dense, "--text", given, "--out", tmp_path / "tokens"),
    ):
        refused(run, path.name, *args)


def test_among_tokens(dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run) -> None:
    tokens = tmp_path / "tokens"
    make_tokens(run, dense, text, tokens)
    shard = next(tokens.rglob("*.bin"))
    for path in (shard, tokens / "index.json"):
        path.write_text(POINTER)
        args = ("pretrain", "--recipe", "stories260k", "--model", converted[0], "--parent", dense, "--dry-run")
        refused(run, path.name, *args, "--set", f"data.train={tokens}", "--set", "data.validation=null")
