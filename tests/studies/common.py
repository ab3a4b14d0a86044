"""A tiny study: a random dense model, two kinds of text, a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.studies.recipe import CompareRecipe, load_compare_recipe

REPAIRED = {"name": "repaired", "method": "kmeans", "rescale": "unit", "shared_by": "power", "router": "ridge",
            "repair": "least_squares"}  # fmt: skip


def write_text(folder: Path, documents: int, seed: int, characters: int = 100) -> Path:
    """Documents of random characters, each one token; every third is of the domain ``b``."""
    rng = np.random.default_rng(seed)
    for i in range(documents):
        path = folder / ("b" if i % 3 == 2 else "a") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(chr(33 + c) for c in rng.integers(0, 90, characters)))
    return folder


def make_study(folder: Path, **keys: Any) -> CompareRecipe:
    """A recipe with text in ``folder``; ``keys`` come on top."""
    write_text(folder / "calibration", 6, seed=1)
    write_text(folder / "evaluation", 3, seed=2)
    data: dict[str, Any] = {
        "methods": ["kmeans", REPAIRED],
        "evaluation": [str(folder / "evaluation")],
        "evaluation_tokens": 64,
        "context_length": 32,
        "calibration": [str(folder / "calibration")],
        "calibration_tokens": 384,
        "calibration_length": 64,
        "batch_size": 4,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data | keys))
    return load_compare_recipe(path)


def open_dense(folder: Path) -> DenseModel:
    return understand(open_checkpoint(locate(folder)))
