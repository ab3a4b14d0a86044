"""The models and tokens that tests of whole runs share within a module."""

from __future__ import annotations

import pytest

from .runs import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))
