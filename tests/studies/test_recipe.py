"""Recipes of studies: what is taken, and every error at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llamamoe.errors import UsageError
from llamamoe.studies.recipe import load_compare_recipe

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "recipes" / "compare").glob("*.yaml"))


def load(tmp_path: Path, **data: Any) -> Any:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"methods": ["kmeans"], "evaluation": "text"} | data))
    return load_compare_recipe(path)


def message(tmp_path: Path, **data: Any) -> str:
    with pytest.raises(UsageError) as error:
        load(tmp_path, **data)
    return str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid_and_says_what_it_is(path: Path) -> None:
    assert load_compare_recipe(path).methods
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_a_method_by_name_and_by_keys(tmp_path: Path) -> None:
    recipe = load(tmp_path, methods=["kmeans", {"name": "mine", "method": {"name": "kmeans", "n_init": 2}, "top_k": 3}])
    assert recipe.methods[0].split_recipe(seed=4).seed == 4
    mine = recipe.methods[1].split_recipe(num_experts=5)
    assert (mine.method.options["n_init"], mine.top_k, mine.num_experts) == (2, 3, 5)


def test_every_error_at_once_with_near_misses(tmp_path: Path) -> None:
    text = message(
        tmp_path, methods=[{"name": "a", "method": "kmaens", "router": "ridg"}, {"name": "b", "metod": "kmeans"}],
        budget=[2], evaluation_tokens=0,
    )  # fmt: skip
    for expected in ("unknown splitter 'kmaens'. Did you mean 'kmeans'", "unknown router 'ridg'. Did you mean 'ridge'",
                     "metod: unknown key. Did you mean 'method'", "budget: unknown key. Did you mean 'budgets'",
                     "evaluation_tokens"):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"methods": []}, "methods: there are none"),
        ({"budgets": []}, "budgets: there are none"),
        ({"budgets": [1.5]}, "less than or equal to 1"),
        ({"seeds": []}, "seeds: there are none"),
        ({"seeds": {0.5: [1]}, "budgets": [0.25]}, "there are none for the budget 0.25"),
        ({"methods": ["kmeans", "kmeans"]}, "appears twice"),
        ({"methods": [{"name": "a", "method": "kmeans", "seed": 1}]}, "seed is decided by the study"),
        ({"methods": [{"name": "a", "method": "kmeans", "align": {"tokens": 1}}]}, "align.tokens"),
        ({"methods": [{"name": "a", "method": "kmeans", "sizes": {0.5: {"n": 1}}}]}, "sizes.0.5.n: unknown key"),
        ({"methods": ["kmens"]}, "Did you mean 'kmeans'"),
        ({"methods": [{"name": "a/b", "method": "kmeans"}]}, "must have 1 to 60 characters, none of them /"),
        ({"calibration": ["auto", "x"]}, "cannot be mixed"),
        ({"static_by": "powr"}, "Did you mean 'power'"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: dict[str, Any], expected: str) -> None:
    assert expected in message(tmp_path, **data)


def test_sizes_at_a_budget_that_is_not_measured_are_named(tmp_path: Path) -> None:
    sizes = {0.25: {"num_experts": 4}, 0.5: {"num_experts": 4}}
    methods = [{"name": "a", "method": "kmeans", "sizes": sizes}]
    recipe = load(tmp_path, methods=methods, budgets=[0.5])
    assert recipe.unused_sizes() == ("the sizes of a at budget 0.25 are not used: it is measured at 0.5",)
    assert not load(tmp_path, methods=[{**methods[0], "budgets": [0.25, 0.5]}], budgets=[0.1]).unused_sizes()


def test_overrides_and_given_values_win(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("methods: [kmeans]\nevaluation: a\nbudgets: [0.5]\n")
    recipe = load_compare_recipe(path, given={"evaluation": ["b"], "device": None}, overrides=["budgets=[0.25]"])
    assert (recipe.evaluation, recipe.budgets, recipe.device) == (("b",), (0.25,), "auto")
    with pytest.raises(UsageError, match="cannot be read"):
        load_compare_recipe(tmp_path / "none")
