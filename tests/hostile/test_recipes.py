"""Hostile recipes: one error with exit code 2 in every command that takes one, at once and in little memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from llamamoe_cli.main import root

from llamamoe.conversion.recipe import load_recipe
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.errors import LlamaMoeError, UsageError
from llamamoe.evaluation.tasks import load_task_recipe
from llamamoe.healing.recipe import load_heal_recipe
from llamamoe.studies.recipe import load_compare_recipe
from llamamoe.training.recipe import load_pretrain_recipe

Load = Callable[[Path], Any]
LOADERS = {
    "split": load_recipe,
    "pretrain": load_pretrain_recipe,
    "heal": load_heal_recipe,
    "compare": load_compare_recipe,
    "tokenize": load_tokenize_recipe,
    "evaluate": load_task_recipe,
}
BOMB = "x0: &a0 [x,x,x,x,x,x,x,x]\n" + "".join(f"x{i}: &a{i} [{','.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12))
BAD = {
    "include: 0x" + "f" * 5000: "include is a whole number of 5,002 digits",
    "seed: " + "9" * 101: "seed is a whole number of 101 digits",
    "seed: " + "9" * 9000: "seed is a whole number of 9,000 digits",
    'method: "\\ud800"': "method = '\\ud800' holds half a character",
    'text: "a\\0b"': "text = 'a\\x00b' holds the character NUL",
    "method: " + "[" * 70 + "]" * 70: "method.0 is nested more than 64 levels",
    "method: " + "[" * 5000: "recursion",
    "method: &x [*x]": "method.0 is nested",
    BOMB: "too many values",
    "method: 2024-13-45": "month must be in 1..12",
    "? [a]\n: b": "unhashable key",
    "1: 2": "1",
    "method: !!python/object/apply:os.system [x]": "python/object",
    "a: !!timestamp x": "not YAML",
    "method: a\nmethod: b": "appears twice",
    "\x00": "not YAML",
    "- 1": "must hold a mapping",
    "": "must hold a mapping",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:20]))
@pytest.mark.parametrize("command", LOADERS)
def test_one_error_whatever_the_recipe_is_for(command: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        LOADERS[command](path)
    assert BAD[text] in str(caught.value)
    assert len(str(caught.value)) < 2200
    assert time.process_time() - started < 5


def refused(command: str, path: Path) -> str:
    arguments = {
        "split": ["SOURCE", "OUT", "--recipe", path],
        "pretrain": ["--recipe", path, "--out", "OUT"],
        "heal": ["MODEL", "OUT", "--parent", "PARENT", "--text", "TEXT", "--recipe", path],
        "compare": ["SOURCE", "--out", "OUT", "--recipe", path],
        "tokenize": ["--out", "OUT", "--recipe", path],
        "evaluate": ["MODEL", "--recipe", path],
    }[command]
    result = CliRunner().invoke(root, [command, *map(str, arguments)], prog_name="llamamoe")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: "), result.stderr
    assert "traceback" not in result.stderr.lower()
    return result.stderr


@pytest.mark.parametrize("command", LOADERS)
def test_every_command_reports_it(command: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("include: 0x" + "f" * 5000)
    assert "include is a whole number" in refused(command, path)


@pytest.mark.parametrize("command", LOADERS)
def test_only_a_regular_file_of_a_bounded_size_is_read(command: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(LlamaMoeError, match="is a pipe"):
        LOADERS[command](tmp_path / "pipe.yaml")
    with pytest.raises(LlamaMoeError, match="is a folder"):
        LOADERS[command](tmp_path)
    with pytest.raises(LlamaMoeError, match="is a device"):
        LOADERS[command](Path("/dev/zero"))
    (tmp_path / "long.yaml").write_text("# " + "x" * 2**21)
    with pytest.raises(LlamaMoeError, match="1,048,576 bytes"):
        LOADERS[command](tmp_path / "long.yaml")


@pytest.mark.parametrize("name", [["token_clusters"], {"a": 1}, 5, None])
def test_the_name_of_a_method_of_a_study_must_be_text(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"calibration": "t", "evaluation": "e", "budgets": [0.5], "methods": [{"name": name}]})
    )
    with pytest.raises(UsageError, match="methods"):
        load_compare_recipe(path)


def test_kinds_are_told_in_the_words_of_recipes() -> None:
    for key, value, kind in (("align", 5, "a mapping (key: value)"), ("keep_dense", 5, "a list")):
        with pytest.raises(UsageError, match=re.escape(f"{key}: must be {kind} (got 5)")):
            load_recipe(given={key: value})
