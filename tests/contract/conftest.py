"""Fixtures of the contract tests of every kind."""

from __future__ import annotations

import pytest

from .world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The layer that every plug-in is tried on."""
    return make_world(tmp_path_factory.mktemp("world"))
