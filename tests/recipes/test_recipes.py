"""Every shipped recipe validates and runs, and the pages beside the recipes name and run all of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import llamamoe
from llamamoe.conversion.defaults import complete
from llamamoe.conversion.recipe import SplitRecipe, load_recipe
from tests.dense import make_byte_level, make_dense
from tests.documents.pages import run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "split").glob("*.yaml"))


@pytest.fixture
def beside_the_demo(tmp_path, monkeypatch) -> Path:
    """A folder with what commands find: the demonstration's output (tiny) and the recipes."""
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
    chosen = {"num_experts", "top_k"} if recipe.prefer else set()
    assert set(yaml.safe_load(path.read_text())) == set(SplitRecipe.model_fields) - chosen
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
    """Return whether a method of the recipe reads calibration text."""
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
    heads = {}
    if asked.target == "jetmoe":  # 4 query heads for each of 2 key/value heads, without biases
        variant, heads = variant.replace("qwen2", "llama-tied"), {"num_attention_heads": 8}
    result = llamamoe.split(make_dense(tmp_path / "dense", variant, **heads), tmp_path / "moe", recipe)
    assert result.receipt["verification"]["passed"]
    assert bool(result.receipt["calibration"]) == needs_text(asked)
    assert load_recipe(tmp_path / "moe" / "llamamoe_recipe.yaml") == result.plan.recipe


MIXES = sorted((ROOT / "recipes" / "mix").glob("*.yaml"))


@pytest.mark.parametrize("path", MIXES, ids=lambda p: p.stem)
def test_a_recipe_of_mix_comments_every_key_and_runs(tmp_path, path):
    assert set(yaml.safe_load(path.read_text())) == set(llamamoe.MixRecipe.model_fields)
    assert all(
        not line or line.startswith("#") or "  # " in line for line in path.read_text().splitlines() if line[:1] != " "
    )
    models = [make_dense(tmp_path / str(seed), seed=seed) for seed in range(2)]
    given = {"experts": [str(each) for each in models]}
    if yaml.safe_load(path.read_text())["prompts"] is not None:
        given["prompts"] = str(tmp_path / "prompts.yaml")
        # the example in the head of the recipe
        lines = [line.removeprefix("#     ") for line in path.read_text().splitlines() if line.startswith("#     ")]
        (tmp_path / "prompts.yaml").write_text("\n".join(lines))
    if (texts := yaml.safe_load(path.read_text())["texts"]) is not None:
        given["texts"] = [str(write_words(tmp_path / name)) for name in texts]
    recipe = llamamoe.load_mix_recipe(path, given=given)
    assert llamamoe.mix(models[0], tmp_path / "out", recipe).receipt["verification"]["passed"]
    assert f"`mix/{path.name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "resplit").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_of_resplit_comments_every_key_and_runs(tmp_path, path):
    assert set(yaml.safe_load(path.read_text())) == set(llamamoe.ResplitRecipe.model_fields)
    assert all(not line or line.startswith("#") or "  # " in line for line in path.read_text().splitlines())
    given = {"num_experts": 4, "top_k": 2, "method": "random", "target": "mixtral"}
    moe = llamamoe.split(make_dense(tmp_path / "dense"), tmp_path / "moe", load_recipe(given=given), verify=False).out
    text = {"calibration": [str(write_words(tmp_path / "text.txt"))]}
    recipe = llamamoe.load_resplit_recipe(path, given=text)
    assert llamamoe.resplit(moe, tmp_path / "out", recipe=recipe).top_k == (2, 4)
    assert f"`resplit/{path.name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_the_calibrated_recipe_is_what_auto_means():
    recipe = load_recipe(ROOT / "recipes" / "split" / "calibrated.yaml", given={"calibration": ["given.txt"]})
    auto = load_recipe(given={"calibration": ["given.txt"], "calibration_length": recipe.calibration_length})
    for size in (172, 1536, 2048):
        assert complete(recipe, size).recipe == complete(auto, size).recipe


HOW_TOS = ("README.md", "split/README.md")


def test_how_tos_name_every_recipe():
    how_to, which = ((ROOT / "recipes" / name).read_text(encoding="utf-8") for name in HOW_TOS)
    assert RECIPES
    for path in RECIPES:
        assert f"`split/{path.name}`" in how_to
        assert f"`{path.name}`" in which


@pytest.mark.parametrize("name", HOW_TOS)
def test_links_lead_somewhere(name):
    page = ROOT / "recipes" / name
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("name", HOW_TOS)
def test_commands_of_the_how_tos_run(beside_the_demo, name):
    lines = re.findall(r"^    llamamoe (.+)$", (ROOT / "recipes" / name).read_text(encoding="utf-8"), re.MULTILINE)
    names = {"SOURCE": "demo-output/dense", "OUT": "out", "texts/": "demo-output/text/calibration"}
    commands = [[names.get(word, word) for word in shlex.split(line, comments=True)] for line in lines]
    assert commands
    for arguments in commands:
        run(arguments)
