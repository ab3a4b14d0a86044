"""Families that no target computes exactly are refused with the reason, wherever a checkpoint is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import llamamoe
from llamamoe.architectures.inspect import inspect
from llamamoe.architectures.sources import SOURCES
from llamamoe.architectures.sources.refused import REFUSED
from tests.dense import make_dense


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "dense", num_hidden_layers=1)


def rename(source: Path, **keys: object) -> None:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_they_are_families_of_transformers_that_are_not_read() -> None:
    assert set(CONFIG_MAPPING) >= REFUSED.keys()
    assert not REFUSED.keys() & set(SOURCES.names())


@pytest.mark.parametrize("family", REFUSED)
def test_split_and_inspect_say_why(source: Path, family: str) -> None:
    rename(source, model_type=family, num_local_experts=4)
    with pytest.raises(llamamoe.CheckpointError) as error:
        llamamoe.plan_conversion(source, llamamoe.load_recipe(given={"method": "random", "num_experts": 4}))
    assert REFUSED[family] in error.value.message
    assert repr(family) in error.value.message


@pytest.mark.parametrize(("text", "said"), [("llama", "text part"), ("gemma3_text", REFUSED["gemma3_text"])])
def test_of_a_model_of_images_and_text_the_text_part_decides(source: Path, text: str, said: str) -> None:
    rename(source, model_type="aria", text_config={"model_type": text})
    refusal = inspect(source).refusal
    assert refusal is not None
    assert "model of more than text" in refusal
    assert said in refusal
