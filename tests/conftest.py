"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc

import hypothesis
import pytest

# an example's time depends on what else the machine does
hypothesis.settings.register_profile("llamamoe", deadline=None)
hypothesis.settings.load_profile("llamamoe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Spare the collections that free models all that torch, transformers and the tests imported: a third of a second each."""
    gc.collect()
    gc.freeze()
