"""Every shipped recipe validates and runs; every command and every line of Python in README does what it says."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import llamamoe
from llamamoe.architectures.targets import TARGETS, clients
from llamamoe.catalog import Cell, matrix
from llamamoe.conversion.defaults import complete
from llamamoe.conversion.recipe import SplitRecipe, load_recipe
from tests.dense import make_byte_level, make_dense

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "split").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)  # in turns: opening, closing
    return [text for kind, text in found if kind == language]


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("llamamoe ")
]


SHRUNK = {
    "pretrain": [
        *(
            "--set",
            "tokens=null",
            "--set",
            "steps=2",
            "--set",
            "data.block_length=32",
            "--set",
            "data.validation_blocks=2",
        )
    ],
    "heal": ["--set", "epochs=1", "--set", "length=64"],
}
"""What makes commands of the README short enough for a test."""


@pytest.fixture
def beside_the_demo(tmp_path, monkeypatch) -> Path:
    """A folder with what the README's commands find: the demonstration's output (tiny) and the recipes."""
    dense = make_dense(tmp_path / "demo-output" / "dense", "llama-tied", max_position_embeddings=2048, vocab_size=300)
    make_byte_level(dense, "smollm")
    text = tmp_path / "demo-output" / "text"
    write_words(text / "calibration" / "class.txt")
    (text / "evaluation").mkdir()
    (text / "evaluation" / "topic.txt").write_text("The assert statement is a way to insert debugging assertions. " * 8)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_names_every_key_and_comments_it(path):
    recipe = load_recipe(path)
    assert set(yaml.safe_load(path.read_text())) == set(SplitRecipe.model_fields)
    assert recipe == load_recipe(path, given={"seed": recipe.seed})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        opens_mapping = re.fullmatch(r"\w+:", line)
        assert not line or line.startswith("#") or opens_mapping or "  # " in line, line


def write_words(path: Path, words: int = 300) -> Path:
    """Text of a few words in random order, one token per letter in the tiny models' tokenizer."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(rng.choice(["assert", "the", "class", "of", "a", "statement", "None", "is", "in"], words)))
    return path


def needs_text(recipe: SplitRecipe) -> bool:
    """Whether a method of the recipe reads calibration text."""
    return complete(recipe.model_copy(update={"calibration": ("given.txt",)})).calibrated


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_head_of_a_recipe_says_how_to_run_it(path):
    head = [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   llamamoe ")]
    text = " --calibration PATH" * needs_text(load_recipe(path))
    assert head == [f"llamamoe split SOURCE OUT --recipe recipes/split/{path.name}{text}"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_a_recipe_runs_on_a_tiny_model(tmp_path, path, variant):
    asked = load_recipe(path)
    top_k = max(1, round(4 * asked.top_k / asked.num_experts))
    text = write_words(tmp_path / "text.txt")
    small = ["calibration_tokens=512", "calibration_length=64", f"calibration={text}"] if needs_text(asked) else []
    small += ["align.tokens=1024", "align.length=32", "align.batch=128"] if asked.align else []
    recipe = load_recipe(path, overrides=["num_experts=4", f"top_k={top_k}", *small])
    result = llamamoe.split(make_dense(tmp_path / "dense", variant), tmp_path / "moe", recipe)
    assert result.receipt["verification"]["passed"]
    assert bool(result.receipt["calibration"]) == needs_text(asked)
    assert load_recipe(tmp_path / "moe" / "llamamoe_recipe.yaml") == result.plan.recipe


def test_the_calibrated_recipe_is_what_auto_means():
    recipe = load_recipe(ROOT / "recipes" / "split" / "calibrated.yaml", given={"calibration": ["given.txt"]})
    auto = complete(load_recipe(given={"calibration": ["given.txt"], "calibration_length": recipe.calibration_length}))
    assert complete(recipe).recipe == auto.recipe


HOW_TOS = ("README.md", "split/README.md")


def test_readme_and_how_to_name_every_recipe():
    how_to, which = ((ROOT / "recipes" / name).read_text(encoding="utf-8") for name in HOW_TOS)
    assert RECIPES
    for path in RECIPES:
        assert f"split/{path.name}" in README
        assert f"`split/{path.name}`" in how_to
        assert f"`{path.name}`" in which


def test_readme_is_short():
    assert len(README.splitlines()) < 250


@pytest.mark.parametrize("page", ["README.md", *(f"recipes/{name}" for name in HOW_TOS)])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


def test_paths_in_the_tree_exist():
    tree = next(block for block in blocks("") if block.startswith("llamamoe/"))
    for name in re.findall(r"\b(\w+)/", tree):
        assert (ROOT / name).is_dir() or (ROOT / "llamamoe" / name).is_dir(), name


def test_the_makefile_has_the_targets_that_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"\bmake (\w+)", README):
        if name not in ("lists", "s", "each", "its"):
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def run_all(commands: list[list[str]]) -> None:
    """In order, as a reader would type them."""
    pytest.importorskip("llamamoe_cli.main")
    from click.testing import CliRunner

    cli = importlib.import_module("llamamoe_cli.main")
    command = next(value for value in vars(cli).values() if type(value).__name__ == "Root")
    for args in commands:
        result = CliRunner().invoke(command, args)
        assert result.exit_code == 0, f"llamamoe {shlex.join(args)}\n{result.output}\n{result.exception!r}"


def test_commands_of_the_readme_run(beside_the_demo):
    """On a tiny model in the place of the demonstration's."""
    assert [args[0] for args in COMMANDS] == [
        *(
            "inspect",
            *("split", "split", "split", "split"),
            "verify",
            "evaluate",
            "bench",
            "report",
            "compare",
            "fix-config",
            "export-gguf",
        ),
        *("tokenize", "tokenize", "heal", "pretrain", "merge", "retop", "densify"),
    ]
    run_all([args + SHRUNK.get(args[0], []) for args in COMMANDS])
    assert (beside_the_demo / "my-run" / "model" / "config.json").is_file()
    assert not (beside_the_demo / "comparison").exists()
    assert json.loads((beside_the_demo / "my-moe" / "llamamoe_receipt.json").read_text())["calibration"]


@pytest.mark.parametrize("name", HOW_TOS)
def test_commands_of_the_how_tos_run(beside_the_demo, name):
    lines = re.findall(r"^    llamamoe (.+)$", (ROOT / "recipes" / name).read_text(encoding="utf-8"), re.MULTILINE)
    names = {"SOURCE": "demo-output/dense", "OUT": "out", "texts/": "demo-output/text/calibration"}
    commands = [[names.get(word, word) for word in shlex.split(line, comments=True)] for line in lines]
    assert commands
    run_all(commands)


def test_python_of_the_readme_runs(beside_the_demo, capsys):
    plain, library = blocks("python")
    assert "llamamoe" not in plain
    assert len([line for line in plain.splitlines() if line]) == 3
    llamamoe.split("demo-output/dense", "my-moe", verify=False)
    exec(plain, {})
    exec(library, {})
    assert capsys.readouterr().out.startswith("Experts are")
    assert (beside_the_demo / "my-kmeans-moe" / "llamamoe_receipt.json").is_file()


def cell_text(plain: Cell, shared: Cell) -> str:
    if not plain.supported and not shared.supported:
        return "–"
    first = plain if plain.supported else shared
    return ("✓" if "4.57" in first.transformers else "5") + " s" * shared.supported + " *" * (first.dtype == "float32")


def matrix_table() -> str:
    found = matrix()
    rows = [["source", *found.targets], ["---"] * (1 + len(found.targets))]
    for family, variant in found.rows:
        name = family if variant == "plain" else f"{family}, {variant}"
        plain = [found.cell(family, target, variant=variant) for target in found.targets]
        shared = [found.cell(family, target, variant=variant, shared=True) for target in found.targets]
        rows.append([name, *map(cell_text, plain, shared)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_of_other_programs_is_the_data():
    header, *rows = zip(*clients.table(), strict=True)
    titles = [header[0], *(f"`{kind}`" for kind in header[1:])]
    assert "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)) in README
    assert clients.versions() in README.replace("\n", " ")
    for client in clients.CLIENTS:
        assert {kind.split()[0] for kind in client.results} == set(TARGETS.names()), client.name


def test_the_table_of_the_readme_is_the_matrix():
    assert "| llama | ✓ s | ✓ s | ✓ s | ✓ | ✓ s | – |" in README
    assert matrix_table() in README
