"""Read the receipts that commands leave beside a model's weights; any of them may be missing or broken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import read_json
from .out_folder import DERIVED_FILE, HEAL_RECEIPT_FILE, RECEIPT_FILE, TRAINING_RECEIPT_FILE
from .paths import inside

RECEIPTS = (RECEIPT_FILE, HEAL_RECEIPT_FILE, TRAINING_RECEIPT_FILE, DERIVED_FILE)
"""Those of `split`, `heal`, `pretrain`, and of commands that rewrite a checkpoint."""
DOCUMENT_HASHES = "document_hashes"
"""Key of the hashes of documents to which weights were fitted: where a receipt describes a text, and for what its model was made of."""


def read_receipts(folder: Path) -> list[dict[str, Any]]:
    """Return the content of each of `RECEIPTS`; empty if it is missing or broken."""
    return [_read(folder / name) for name in RECEIPTS]


def documents_fitted_to(*folders: Path) -> list[str]:
    """Return the hashes of the documents to which weights of models were fitted, as far as their receipts hold them."""
    found: set[str] = set()
    pending: list[Any] = [receipt for folder in folders for receipt in read_receipts(folder)]
    while pending:
        each = pending.pop()
        if isinstance(each, Mapping):
            pending.extend(each.values())
            if isinstance(hashes := each.get(DOCUMENT_HASHES), list):
                found.update(one for one in hashes if isinstance(one, str))
        elif isinstance(each, list):
            pending.extend(each)
    return sorted(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(inside(path.parent, path.name)) if path.is_file() else {}
    except CheckpointError:
        return {}  # what else is known of the model is still useful
