"""The recipe's choice of how attention is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamamoe import pretrain
from llamamoe.errors import UsageError
from llamamoe.training.model import load_model
from llamamoe.training.parent import load_parent

from .runs import lines_of, make_world, recipe_of


def test_attention_is_computed_as_the_recipe_says(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    losses = []
    for name in ("sdpa", "eager"):
        recipe = recipe_of(world, "steps=2", f"attn_implementation={name}")
        assert load_model(Path(world["model"]), recipe, "cpu").config._attn_implementation == name
        result = pretrain(recipe, tmp_path / name)
        losses.append([line["loss"] for line in lines_of(result.out) if line["kind"] == "train"])
        assert not any("attn" in key for key in json.loads((result.model / "config.json").read_text()))
        parent = load_parent(Path(world["parent"]), Path(world["model"]), attn_implementation=name)
        assert parent.model.config._attn_implementation == name
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(UsageError, match="attn_implementation = flash_attention_2"):
        pretrain(recipe_of(world, "steps=1", "attn_implementation=flash_attention_2"), tmp_path / "flash")
