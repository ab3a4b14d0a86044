"""Tiny converted models to heal, text for them, and a way to heal them in other processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import llamamoe
from llamamoe.healing.recipe import HealRecipe, load_heal_recipe

SMALL = {"tokens": 1024, "length": 32, "held_out": 0.25, "epochs": 3, "batch": 128, "lr": 0.05, "router": "trained"}


def write_text(path: Path, seed: int = 0, words: int = 400) -> Path:
    """Words of a small vocabulary in random order; one character is one token of the tiny tokenizer."""
    generator = random.Random(seed)
    path.write_text(" ".join(generator.choice(["abc", "de", "fgh", "ijkl", "mno"]) for _ in range(words)))
    return path


def convert(dense: Path, out: Path, **given: Any) -> Path:
    """A random split, 2 of 4 experts, not verified."""
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, **given})
    return llamamoe.split(dense, out, recipe, verify=False).out


def heal_recipe(text: Path, **given: Any) -> HealRecipe:
    """A recipe of a few steps."""
    return load_heal_recipe(given={**SMALL, "text": [str(text)], **given})


def receipt(folder: Path) -> dict[str, Any]:
    """Return the progress that healing reported."""
    found: dict[str, Any] = json.loads((folder / "llamamoe_heal.json").read_text())
    return found
