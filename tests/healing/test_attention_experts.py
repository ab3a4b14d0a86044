"""Healing a model whose attention is routed, too: its FFNs only, as large as its residual stream requires."""

from __future__ import annotations

from pathlib import Path

import pytest

import llamamoe
from llamamoe.healing.heal import heal
from llamamoe.healing.plan import plan_heal
from tests.dense import make_dense
from tests.healing.common import convert, heal_recipe


def test_of_routed_attention_the_ffn_alone_is_healed(tmp_path: Path, text: Path) -> None:
    dense = make_dense(tmp_path / "dense", num_attention_heads=8)
    moe = convert(dense, tmp_path / "moe", target="jetmoe")
    plan = plan_heal(moe, dense, heal_recipe(text))
    assert any("attention is routed, too, and stays as it is" in warning for warning in plan.warnings)
    assert plan.active_parameters < plan.trained_parameters
    with pytest.raises(llamamoe.RefusedError, match="inputs = model needs the hidden states of MODEL"):
        plan_heal(moe, dense, heal_recipe(text, inputs="model"))
    other = make_dense(tmp_path / "other", num_attention_heads=4)
    with pytest.raises(llamamoe.RefusedError, match="num_local_experts is 4 and 2"):
        plan_heal(moe, other, heal_recipe(text))
    small = heal_recipe(text, competitive_epochs=1, epochs=1, tokens=512)
    told = heal(moe, tmp_path / "out", small, parent=dense).receipt["layers"]
    assert all(layer["kept"] for layer in told)
