"""The limits of Cohere2-MoE, and mixtures of this architecture that others configured otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llamamoe
from llamamoe.architectures.dense_checkpoint import understand
from llamamoe.architectures.expert_weighting import mixing_of
from llamamoe.architectures.targets.cohere2_moe import Cohere2Moe
from llamamoe.architectures.targets.dense import Dense
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.training.moe_layers import find_moe_layers
from tests.dense import make_dense
from tests.training.tiny_moe import COMMON, KEYS


def test_rotary_positions_belong_to_windows(tmp_path: Path) -> None:
    spec = understand(open_checkpoint(locate(make_dense(tmp_path / "dense", "cohere2")))).spec
    assert (spec.sliding, spec.no_rope) == ((8, None), (1,))
    for target in (Cohere2Moe(), Dense()):
        assert not target.refusals(spec)
        assert target.refusals(replace(spec, no_rope=()))
        assert target.refusals(replace(spec, parallel=False))


@torch.no_grad()
def test_full_attention_with_rotary_positions_is_a_window_that_no_context_fills(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", "cohere")
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 4})
    result = llamamoe.split(source, tmp_path / "out", recipe, verify=False)
    spec = Cohere2Moe().dense_spec(result.plan.config)
    assert (spec.sliding, spec.no_rope) == ((None, None), ())
    ids = torch.randint(3, 128, (1, 96), generator=torch.Generator().manual_seed(0))  # max_position_embeddings is 64
    parent, child = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, result.out))
    torch.testing.assert_close(child, parent, rtol=0, atol=5e-3)


def test_norms_of_each_head_are_refused(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", "cohere", use_qk_norm=True)
    with pytest.raises(llamamoe.RefusedError, match="cohere2_moe cannot hold a LayerNorm on queries and keys"):
        llamamoe.plan_conversion(
            source, llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "target": "cohere2_moe"})
        )


@pytest.mark.parametrize(
    ("key", "value"), [("expert_selection_fn", "sigmoid"), ("shared_expert_combination_strategy", "average")]
)
def test_other_routing_is_refused_by_key(key: str, value: str) -> None:
    config: dict[str, Any] = {**COMMON, **KEYS["cohere2_moe"], key: value, "model_type": "cohere2_moe"}
    with pytest.raises(llamamoe.RefusedError, match=f"{key} = '{value}'"):
        mixing_of(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with pytest.raises(llamamoe.RefusedError, match=f"{key} = '{value}'"):
        find_moe_layers(model)
