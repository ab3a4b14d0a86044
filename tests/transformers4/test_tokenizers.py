"""Tokenizers that we write make the same ids in transformers 4.57 as in 5."""

from __future__ import annotations

from typing import Any

import pytest

from llamamoe import split
from tests.conversion.test_tokenizers import CASES, TARGETS, code_llama, code_llama_class, parent_of, recipe_for
from tests.paths import needs_shared_data

from .loading import PYTHON, expect_logits, run_older

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="LLAMAMOE_TRANSFORMERS4_PYTHON names no interpreter"),
    needs_shared_data,
]

EVERY = CASES | {f.__name__: f for f in (code_llama, code_llama_class)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("tokenizers4")
    for case, change in EVERY.items():
        parent = parent_of(root / "parents" / case, change)
        for target in TARGETS:
            out = root / f"{case}-{target}"
            split(parent, out, recipe_for(target), verify=False)
            expect_logits(out)
            assert (out / "expected_ids.json").is_file()
    return run_older([path for path in sorted(root.iterdir()) if path.name != "parents"])


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("target", TARGETS)
def test_same_ids(loaded: dict[str, Any], case: str, target: str) -> None:
    assert loaded[f"{case}-{target}"]["ids"] == []
