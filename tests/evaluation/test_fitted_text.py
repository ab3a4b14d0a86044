"""Text that weights were fitted to: what receipts hold of it, and who is warned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamoe.calibration.reading import document_hash
from llamamoe.checkpoint.receipts import RECEIPTS, documents_fitted_to
from llamamoe.data.text import Document
from llamamoe.evaluation.fitted_text import fitted_text_warnings
from llamamoe.models.loading import Opened

DOCUMENTS = [Document(text, "a", f"texts/{text}.txt") for text in ("one", "two", "three")]
TEXT = {"tokens": 3, "document_hashes": [document_hash("one"), document_hash("three")]}


def opened(folder: Path) -> Opened:
    """A model without weights, of which only the folder counts."""
    return Opened(folder.name, {"pretrained_model_name_or_path": str(folder)}, None, None, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("llamamoe_receipt.json", {"calibration": TEXT}),
        ("llamamoe_receipt.json", {"calibration": {"tokens": 1}, "alignment": {"text": TEXT}}),
        ("llamamoe_heal.json", {"text": TEXT}),
        ("llamamoe_derived.json", {"texts": [{"tokens": 1}, TEXT]}),
    ],
)
def test_a_model_that_was_fitted_to_the_text_is_named(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    assert name in RECEIPTS
    (tmp_path / name).write_text(json.dumps(content))
    (warning,) = fitted_text_warnings([opened(tmp_path)], DOCUMENTS)
    assert f"{tmp_path.name} was fitted to 2 of the 3 documents" in warning
    assert "texts/one.txt" in warning
    assert list(fitted_text_warnings([opened(tmp_path)], DOCUMENTS[1:2])) == []


@pytest.mark.parametrize(
    "content", ["", "{", '{"document_hashes": 3}', '{"document_hashes": [3, null, {}]}', '{"calibration": null}']
)
def test_a_receipt_that_holds_nothing_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / "llamamoe_receipt.json").write_text(content)
    assert documents_fitted_to(tmp_path, tmp_path / "gone") == []
