"""``llamamoe heal``: what it prints, its JSON, its errors, and its recipes; a dry run imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from llamamoe.healing.recipe import HealRecipe, load_heal_recipe
from tests.healing.common import write_text

from .conftest import Run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "heal").glob("*.yaml"))
FEW = ("--tokens", "1024", "--set", "length=32", "--set", "batch=128", "--set", "epochs=4", "--device", "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def test_result_for_people_and_as_json(
    dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run
) -> None:
    args = ("heal", converted[0], tmp_path / "out", "--parent", dense, "--text", text, *FEW)
    shown = run(*args).stdout
    for part in ("2 layers healed", "error before", "held-out tokens"):
        assert part in shown
    data = json.loads(run(*args, "--force", "--json").stdout)
    told = json.loads((tmp_path / "out" / "llamamoe_heal.json").read_text())
    assert data == {"out": str(tmp_path / "out"), **told}
    for layer in told["layers"]:
        assert f"{layer['error_before']:.4f}" in shown
        assert f"{layer['error_after']:.4f}" in shown
    again = load_heal_recipe(tmp_path / "out" / "llamamoe_heal.yaml")
    assert (again.tokens, again.batch, again.router) == (1024, 128, "trained")
    assert "is not empty" in run(*args, code=3).output
    assert run(*args, "--force", "-q").stdout == ""


def test_dry_run_writes_nothing_and_imports_no_torch(
    dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run
) -> None:
    args = ("heal", converted[0], tmp_path / "out", "--parent", dense, "--text", text, *FEW, "--dry-run")
    shown = run(*args).stdout
    for part in ("heal 2 layers", "2 selected per token", "held out", "Nothing was written"):
        assert part in shown
    data = json.loads(run(*args, "--json").stdout)
    # 96 tokens of the 1024 are held out: 3 of 32 sequences; 7 steps an epoch are left
    assert (data["held_out_tokens"], data["steps_per_layer"], data["layers"]) == (96, 28, [0, 1])
    code = (
        "import sys; from llamamoe_cli.main import root\n"
        "try: root.main(sys.argv[1:])\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_input(dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    shown = run("heal", converted[0], out, "--parent", dense, code=2).output
    assert "text: is required" in shown
    assert "Give it with --text PATH" in shown
    shown = run("heal", converted[0], out, "--parent", dense, "--text", text, "--set", "epoch=1", "--set", "lr=7",
                code=2).output  # fmt: skip
    assert "Did you mean 'epochs'" in shown
    assert "lr" in shown
    assert "not a mixture of experts" in run("heal", dense, out, "--parent", dense, "--text", text, code=3).output
    assert "Missing argument 'OUT'" in run("heal", converted[0], "--parent", dense, "--text", text, code=2).output
    assert "ships with" in run("heal", converted[0], out, "--parent", dense, "--recipe", "defalt", code=2).output
    assert not out.exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes(
    dense: Path, converted: tuple[Path, Result], text: Path, tmp_path: Path, run: Run, path: Path
) -> None:
    assert set(yaml.safe_load(path.read_text())) == set(HealRecipe.model_fields)
    recipe = load_heal_recipe(path)
    if path.stem == "default":
        assert recipe == HealRecipe(text=recipe.text), "it says what the defaults are"
    args = ("heal", converted[0], tmp_path / "out", "--parent", dense, "--recipe", path.stem, "--text", text, *FEW)
    assert "2 layers healed" in run(*args).stdout
