"""Models are loaded without mapping their files, for as long as that is asked for, and nobody gets other values."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from accelerate.utils import offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, modeling_utils

from llamamoe.checkpoint.unmapped import unmapped
from tests.dense import make_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("models") / "dense")


def is_mapped(folder: Path) -> bool:
    return f"{folder}/model.safetensors" in Path("/proc/self/maps").read_text()


def same(model: Any, folder: Path) -> bool:
    stored = load_file(folder / "model.safetensors")
    return all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_no_file_is_mapped(dense: Path) -> None:
    with unmapped():
        model = AutoModelForCausalLM.from_pretrained(dense)
        assert not is_mapped(dense)
    assert same(model, dense)
    kept = AutoModelForCausalLM.from_pretrained(dense)
    assert is_mapped(dense), "plain transformers would not map it either: then this module is not needed"
    del kept


def test_what_was_replaced_comes_back_after_the_last_of_several() -> None:
    real = safetensors.safe_open
    with unmapped():
        with unmapped(later=True):
            pass
        assert modeling_utils.safe_open is offload.safe_open is safetensors.safe_open is not real
    assert modeling_utils.safe_open is offload.safe_open is safetensors.safe_open is real


def test_values_that_are_read_later_are_not_read_later_by_others(dense: Path) -> None:
    found: list[Any] = []
    with unmapped(later=True):
        mine = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        thread = threading.Thread(target=lambda: found.append(AutoModelForCausalLM.from_pretrained(dense)))
        thread.start()
        thread.join()
    assert same(found[0], dense)
    assert all(parameter.isnan().all() for parameter in mine.parameters())
