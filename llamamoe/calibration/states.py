"""The place of a walk after a stopped run: whether the files of its hidden states hold what they held."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..checkpoint.files import write_text
from ..lazy import torch

_STATE = "state.json"


class KeptStates:
    """Records the hash of the residual stream before a layer, which a walk keeps in two files in turn.

    If a file is missing or damaged, it does not hold what was recorded, and the walk starts again at the first layer.

    Args:
        folder: The folder of the walk's files.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _STATE

    def save(self, layer: int, hidden: torch.Tensor) -> None:
        """Record the inputs of a layer."""
        state = _read_json(self._path)
        state[str(layer % 2)] = {"layer": layer, "sha256": _hash(hidden)}
        write_text(self._path, json.dumps(state) + "\n")

    def holds(self, layer: int, hidden: torch.Tensor) -> bool:
        """Return whether these are the recorded inputs of a layer."""
        kept = _read_json(self._path).get(str(layer % 2))
        return isinstance(kept, dict) and kept == {"layer": layer, "sha256": _hash(hidden)}


def _hash(hidden: torch.Tensor) -> str:
    return hashlib.sha256(hidden.flatten().numpy().view("u1").data).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; empty if the file is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
