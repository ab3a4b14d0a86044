"""Recipes: complete, checked at once, safely read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from pydantic import BaseModel

from llamamoe.conversion.recipe import SplitRecipe, build_recipe, load_recipe
from llamamoe.data.recipe import TokenizeRecipe
from llamamoe.errors import UsageError
from llamamoe.evaluation.tasks import TaskRecipe
from llamamoe.healing.recipe import HealRecipe
from llamamoe.recipes import parse_override, read_recipe_file
from llamamoe.studies.recipe import CompareRecipe
from llamamoe.training.recipe import PretrainRecipe


def test_defaults_are_complete_and_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(given={"method": "kmeans", "router": "centroid", "rescale": "unit", "shared": "2x"})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "r.yaml")
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert recipe.sha256() != load_recipe().sha256()
    assert recipe.method.options["max_iter"] == 50, "defaults are filled in"


def test_later_wins(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\ntop_k: 1\nmethod: kmeans\n")
    recipe = load_recipe(
        tmp_path / "r.yaml", given={"seed": 2, "top_k": None}, overrides=["seed=3", "method.max_iter=7"]
    )
    assert (recipe.seed, recipe.top_k, recipe.method.options["max_iter"]) == (3, 1, 7)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        build_recipe({"num_experts": 1, "top_k": 0, "methid": "random", "router": "centriod", "pad_to": 12,
                      "shared": 1.5, "seed": -1, "dtype": "int8", "shard_size": "big", "strict": "perhaps"})  # fmt: skip
    assert caught.value.exit_code == 2
    text = str(caught.value)
    for words in (
        "num_experts", "got 1", "top_k", "got 0", "methid: unknown key. Did you mean 'method'", "Did you mean 'centroid'",
        "pad_to", "got 12", "the share 1.5 must be below 1", "seed", "dtype", "shard_size", "strict",
    ):  # fmt: skip
        assert words in text
    assert len(text.splitlines()) == 11


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_experts": 1}, ["num_experts", "greater than or equal to 2", "got 1"]),
        ({"num_experts": 10**6}, ["num_experts", "4096"]),
        ({"num_experts": 4, "top_k": 5}, ["top_k = 5 must not exceed num_experts = 4"]),
        ({"top_k": -1}, ["top_k", "got -1"]),
        ({"top_k": [2, 3]}, ["top_k: must be one number for all layers", "top_k_by_layer"]),
        ({"shared": [64, 96]}, ["shared: must be one number for all layers", "zeros"]),
        ({"method": "kmean"}, ["unknown splitter 'kmean'", "Did you mean 'kmeans'", "random"]),
        ({"method": "xyzzy"}, ["unknown splitter 'xyzzy'", "Known: "]),
        ({"method": {"name": "kmeans", "max_itr": 5}}, ["max_itr: unknown key. Did you mean 'max_iter'"]),
        ({"method": {"name": "kmeans", "max_iter": 0}}, ["max_iter", "got 0"]),
        ({"method": {"max_iter": 0}}, ["must be a name or a mapping with a 'name'"]),
        ({"method": 5}, ["must be a name or a mapping"]),
        ({"method": ["random"]}, ["must be a name or a mapping"]),
        ({"method": {"name": ["random"]}}, ["must be a name or a mapping"]),
        ({"method": {"name": "random", "options": 5}}, ["'options' must be a mapping"]),
        ({"method": {"name": "random", 1: 2}}, ["1: unknown key"]),
        ({"method": None}, ["method"]),
        ({"target": "mixtrel"}, ["unknown target 'mixtrel'", "Did you mean 'mixtral'"]),
        ({"shared_by": "norm"}, ["unknown shared_by 'norm'", "weight_norm"]),
        ({"rescale": "dropot"}, ["Did you mean 'dropout'"]),
        ({"router_scale": "medium"}, ["'hard' or 'soft'", "got 'medium'"]),
        ({"keep_dense": ["a"]}, ["keep_dense.0"]),
        ({"keep_dense": 3}, ["keep_dense"]),
        ({"require": "4.56"}, ["require", "4.57"]),
        ({"shard_size": "5B"}, ["shard_size"]),
        ({"shard_size": "5 gigabytes"}, ["shard_size"]),
        ({1: 2}, ["1"]),
    ],
)
def test_errors_name_value_and_rule(keys: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build_recipe(keys)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (0, 0),
        (384, 384),
        ("384", 384),
        (0.25, 0.25),
        ("0.25", 0.25),
        (".5", 0.5),
        (1e-5, 1e-5),
        ("2x", "2x"),
        (0.0, 0.0),
    ],
)
def test_shared_sizes(value: Any, kept: Any) -> None:
    found = build_recipe({"shared": value}).shared
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    "value", [-1, "-1", 1.0, 1.5, "x", "2.5x", "x2", True, [1], {"a": 1}, float("nan"), float("inf"), "9" * 5000, "1e5"]
)
def test_shared_sizes_that_are_none(value: Any) -> None:
    with pytest.raises(UsageError, match="shared"):
        build_recipe({"shared": value})


@drawn(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda c: st.lists(c) | st.dictionaries(st.text(max_size=5), c), max_leaves=5), st.sampled_from(sorted(SplitRecipe.model_fields)))  # fmt: skip
def test_any_value_is_taken_or_refused(value: Any, key: str) -> None:
    try:
        recipe = build_recipe({key: value})
    except UsageError:
        return
    assert isinstance(recipe, SplitRecipe)


# ---- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "5", "- a\n- b", "just text", "null", "a: [", "\ta: 1", "a: b: c", "{a: 1", "[" * 5000, "a: 2026-99-99", "a: !!int ''",
     "a: !!bool x", "? [a]\n: b", "a: &x [*y]", "seed: " + "9" * 5000, "a: \x01"],
)  # fmt: skip
def test_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml") as caught:
        read_recipe_file(tmp_path / "r.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/object/new:set []",
        "!evil x",
    ],
)
def test_tags_run_no_code(tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "r.yaml").write_text("seed: " + tag.format(marker))
    with pytest.raises(UsageError, match="is not YAML"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="is not YAML"):
        load_recipe(overrides=["seed=" + tag.format(marker)])
    assert not marker.exists()


def test_aliases_do_not_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    for key in ("shared", "seed", "keep_dense", "target", "method", "dtype"):
        (tmp_path / "r.yaml").write_text("\n".join([*lines, f"{key}: *a8"]))
        with pytest.raises(UsageError) as caught:
            load_recipe(tmp_path / "r.yaml")
        assert len(str(caught.value)) < 5000


def test_recursive_yaml(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: &a\n  name: kmeans\n  tol: *a\n")
    with pytest.raises(UsageError, match="tol"):
        load_recipe(tmp_path / "r.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfd")
    for name in ("none.yaml", ".", "bytes.yaml"):
        with pytest.raises(UsageError):
            load_recipe(tmp_path / name)


# ---- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "seed", "=1", "a..b=1", ".a=1", "seed=[", "seed=a: b: c", "seed=2026-99-99"])
def test_broken_overrides(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_override(text)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["router.std=1"], "name the router first"),
        (["nothing.a=1"], "there is no 'nothing'"),
        (["seed=5", "seed.a=1"], "seed = 5 has no keys"),
        (["keep_dense=[0]", "keep_dense.a=1"], "has no keys"),
        (["method.max_iter.a=1"], "there is no 'max_iter'"),
        (["sed=1"], "Did you mean 'seed'"),
    ],
)
def test_overrides_that_fit_nothing(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe(overrides=texts)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("seed: 1\nmethod: {name: random}\nseed: 2\n")
    with pytest.raises(UsageError, match="'seed' appears twice"):
        load_recipe(tmp_path / "twice.yaml")


def test_an_option_of_a_method_without_options_says_so() -> None:
    with pytest.raises(UsageError, match=r"rounds: unknown key\. It has no options\."):
        load_recipe(given={"method": {"name": "auto", "rounds": 1}})


@pytest.mark.parametrize("model", [SplitRecipe, PretrainRecipe, HealRecipe, CompareRecipe, TokenizeRecipe, TaskRecipe])
def test_no_recipe_tells_a_user_a_regular_expression(model: type[BaseModel]) -> None:
    assert '"pattern"' not in json.dumps(model.model_json_schema())


@pytest.mark.parametrize("size", ["0", "0GB", "5", "GB", "-5GB", "5 gb", "5GB\n", "1e3GB"])
def test_a_size_that_is_none_is_told_in_words(size: str) -> None:
    with pytest.raises(UsageError, match=r"shard_size: must be a size above 0 with its unit, such as 5GB or 500MB"):
        build_recipe({"shard_size": size})


@pytest.mark.parametrize("device", ["", "GPU", "cuda:", "cuda:1\n", "/dev/null"])
def test_a_device_that_is_none_is_told_in_words(device: str) -> None:
    with pytest.raises(UsageError, match=r"device: must be auto or a device such as cpu, cuda or cuda:1"):
        build_recipe({"device": device})
