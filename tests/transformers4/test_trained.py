"""Trained checkpoints load in transformers 4.57 with the same logits, and so does every checkpoint on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llamamoe
from llamamoe.architectures.targets import TARGETS
from tests.dense import ROUTED
from tests.training.runs import make_world, recipe_of

from .loading import PYTHON, expect_logits, run_older

CASES = [each for each in ROUTED if not TARGETS.get(each[1]).only_five]
pytestmark = pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_TRANSFORMERS4_PYTHON names no interpreter")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint and the end of a short run of every target."""
    root = tmp_path_factory.mktemp("trained")
    folders: list[Path] = []
    for variant, target, shared in CASES:
        world = make_world(
            root / target / "world", variant=variant, target=target, shared=shared, num_experts=3 if shared else 4
        )
        out = root / target / "run"
        model = llamamoe.pretrain(recipe_of(world, "steps=2", "save_every=1"), out).model
        for found, name in ((model, "model"), (out / "checkpoint-1", "checkpoint")):
            folders.append(found.rename(root / f"{target}-{name}"))
            expect_logits(folders[-1])
    return run_older(folders)


@pytest.mark.parametrize("name", ["model", "checkpoint"])
@pytest.mark.parametrize("target", [target for _, target, _ in CASES])
def test_same_logits_and_no_complaint(loaded: dict[str, Any], target: str, name: str) -> None:
    found = loaded[f"{target}-{name}"]
    assert found["keys"] == []
    assert found["warnings"] == []
    assert found["error"] <= 1e-5
