"""Qwen3.5 as it is published: tensors have the names of a model of images and text."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

import llamamoe
from tests.dense import make_dense

GIVEN = {"method": "random", "num_experts": 4, "top_k": 2}


def test_names_of_a_model_of_images_and_text_are_read(tmp_path: Path) -> None:
    """Transformers keeps them when it saves the text model that it loaded from such files."""
    dense = make_dense(tmp_path / "dense", "qwen3_5_text")
    plain = llamamoe.split(dense, tmp_path / "plain", llamamoe.load_recipe(given=GIVEN), verify=False)
    tensors = load_file(dense / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    save_file(named, dense / "model.safetensors", {"format": "pt"})
    other = llamamoe.split(dense, tmp_path / "other", llamamoe.load_recipe(given=GIVEN))
    assert other.receipt["verification"]["passed"]
    first, second = (load_file(each.out / "model.safetensors") for each in (plain, other))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
