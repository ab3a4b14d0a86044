"""A run warns of what it hardly should do, and refuses what it cannot do with the right way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamoe import plan_pretraining, pretrain
from llamamoe.errors import RefusedError, UsageError
from llamamoe.training.model import check_folder

from .runs import lines_of, make_text, recipe_of, tokenized
from .tiny_moe import tiny_moe


def test_one_small_held_out_domain_is_left_out_and_told(
    world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_text(tmp_path / "text", 7)
    (tmp_path / "text" / "small.jsonl").write_text(json.dumps({"text": "ab"}) + "\n")
    held_out = tokenized(tmp_path / "text", tmp_path / "tokens", world["parent"])
    recipe = recipe_of(world, "steps=2", f"data.validation={held_out}")
    told = "the domain 'small' has"
    assert [line for line in plan_pretraining(recipe).warnings if told in line and "not measured" in line]
    pretrain(recipe, tmp_path / "run")
    assert [line for line in caplog.messages if told in line]
    losses = [line["domain_loss"] for line in lines_of(tmp_path / "run") if line["kind"] == "validation"]
    assert all(list(each) == ["large"] for each in losses)
    update = ("data.update=sheared_llama", "data.reference_losses={large: 3.0, small: 1.0}")
    with pytest.raises(UsageError, match="no text of small is held out"):
        plan_pretraining(recipe_of(world, *update, f"data.validation={held_out}"))


def test_blocks_longer_than_the_model_s_positions_are_told(
    world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for length, expected in ((65, 1), (64, 0)):
        recipe = recipe_of(world, "steps=1", "batch_size=4", f"data.block_length={length}", "data.validation=null")
        assert (
            len([line for line in plan_pretraining(recipe).warnings if "longer than the 64 positions" in line])
            == expected
        )
        caplog.clear()
        pretrain(recipe, tmp_path / f"run{length}")
        assert len([line for line in caplog.messages if "longer than the 64 positions" in line]) == expected


def test_experts_of_another_architecture_are_not_called_dense(tmp_path: Path) -> None:
    model: Any = tiny_moe("mixtral")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "olmoe", "num_experts": 6}))
    with pytest.raises(RefusedError, match="'olmoe'") as found:
        check_folder(tmp_path)
    assert "has experts" in str(found.value.hint)
    assert "mixtral" in str(found.value.hint)
    assert "split" not in str(found.value.hint)
