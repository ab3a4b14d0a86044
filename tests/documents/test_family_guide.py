"""The family that the guide adds is found, reads what transformers' class holds, and converts exactly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llamamoe
from llamamoe.architectures import sources
from llamamoe.architectures.sources import SOURCES
from llamamoe.errors import RefusedError
from tests.contract import test_config_fields as contract
from tests.dense import VARIANTS, make_dense

from .pages import ROOT, blocks

FAMILY = "seed_oss"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file of the guide lies in the folder of sources, and its tiny model among the variants."""
    guide = (ROOT / "docs" / "how-to" / "family.md").read_text(encoding="utf-8")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / f"{FAMILY}.py").write_text(next(block for _, block in blocks(guide, "python")))
    assert '`"seed-oss": {"model_type": "seed_oss", "head_dim": 16}`' in guide
    monkeypatch.setitem(VARIANTS, "seed-oss", {"model_type": FAMILY, "head_dim": 16})
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "sources")])
    SOURCES.refresh()
    yield
    monkeypatch.undo()
    SOURCES.refresh()
    sys.modules.pop(f"{sources.__name__}.{FAMILY}")


def test_the_family_of_the_guide_reads_what_the_class_reads(added: None) -> None:
    contract.test_every_key_has_the_default_of_the_class(FAMILY)
    contract.test_every_type_is_that_of_the_class(FAMILY)
    contract.test_what_is_left_out_is_as_the_class_has_it("seed-oss")


def test_the_family_of_the_guide_converts_exactly(added: None, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", "seed-oss")
    for target in ("qwen2_moe", "glm4_moe"):
        recipe = llamamoe.load_recipe(given={"num_experts": 4, "method": "random", "target": target})
        found = llamamoe.split(dense, tmp_path / target, recipe).receipt["verification"]
        assert found["passed"]
        assert found["equal_weights"] < 1e-5
    with pytest.raises(RefusedError, match="mixtral cannot hold"):
        llamamoe.plan_conversion(dense, llamamoe.load_recipe(given={"target": "mixtral"}))
