"""A fingerprint of weights that survives a copy and sees other weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamamoe.checkpoint.contents import content_fingerprint
from llamamoe.checkpoint.headers import read_header


def fingerprint(folder: Path, config: dict[str, object]) -> str:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= read_header(path)
    return content_fingerprint(tensors, config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    weights = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    save_file({"w": weights, "b": torch.zeros(8)}, tmp_path / "a" / "model.safetensors")
    return tmp_path / "a"


def test_a_copy_with_another_time_is_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    assert fingerprint(folder, {"a": 1}) == fingerprint(tmp_path / "copy", {"a": 1})


def test_other_weights_and_another_config_are_seen(folder: Path) -> None:
    first = fingerprint(folder, {"a": 1})
    assert fingerprint(folder, {"a": 2}) != first
    weights = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    save_file({"w": weights * 1.0001, "b": torch.zeros(8)}, folder / "model.safetensors")
    assert fingerprint(folder, {"a": 1}) != first
    save_file({"w": weights.bfloat16(), "b": torch.zeros(8)}, folder / "model.safetensors")
    assert fingerprint(folder, {"a": 1}) != first
