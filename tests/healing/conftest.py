"""Models that the tests of healing share within a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dense import make_dense

from .common import convert, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def model(dense: Path) -> Path:
    return convert(dense, dense.parent / "moe", target="mixtral")
