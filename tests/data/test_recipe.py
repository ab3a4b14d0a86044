"""Recipes of ``llamamoe tokenize``: what is taken, and every error at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llamamoe.data.recipe import TokenizeRecipe, load_tokenize_recipe
from llamamoe.errors import UsageError

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "recipes" / "tokenize").glob("*.yaml"))


def message(**data: Any) -> str:
    with pytest.raises(UsageError) as error:
        load_tokenize_recipe(given={"tokenizer": "m", "text": "t"} | data)
    return str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_names_every_key_and_comments_it(path: Path) -> None:
    assert load_tokenize_recipe(path).text
    text = path.read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) == set(TokenizeRecipe.model_fields)
    assert text.startswith("# ")
    assert all(not line or line.startswith("#") or "  # " in line for line in text.splitlines())


def test_every_error_at_once_with_near_misses() -> None:
    text = message(shard_token=1, validation={"shar": 0.1}, workers=0, gather_bytes="x")
    for expected in ("shard_token: unknown key. Did you mean 'shard_tokens'", "validation.shar: unknown key. Did you mean 'share'",
                     "workers: must be greater", "gather_bytes: must be a valid integer"):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"text": []}, "no text is named"),
        ({"tokenizer": ""}, "tokenizer"),
        ({"domains": {"a": []}}, "domains.a: no path is named"),
        ({"domains": {"": ["x"]}}, "must have 1 to 80 characters"),
        ({"domains": {}}, "at least 1 item"),
        ({"validation": {}}, "give either share or documents"),
        ({"validation": {"share": 0.1, "documents": 3}}, "give either share or documents"),
        ({"validation": {"share": 1.0}}, "less than 1"),
        ({"validation": {"documents": 0}}, "greater than or equal to 1"),
        ({"shard_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_what_is_refused(data: dict[str, Any], expected: str) -> None:
    assert expected in message(**data)


def test_overrides_win_and_workers_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("tokenizer: m\ntext: a\nvalidation: {share: 0.5}\n")
    recipe = load_tokenize_recipe(
        tmp_path / "r.yaml", given={"text": ["b"], "tokenizer": None}, overrides=["validation.share=0.25", "workers=3"]
    )
    assert (recipe.tokenizer, recipe.text, recipe.workers) == ("m", ("b",), 3)
    assert recipe.validation is not None
    assert recipe.validation.hash_limit == 2**62
    assert "workers" not in recipe.deciding()
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_tokenize_recipe(tmp_path / "again.yaml").deciding() == recipe.deciding()
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenize_recipe(tmp_path / "none.yaml")
