"""Checkpoints of every target are recognised by tensor names and keys when they are read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import llamamoe
from llamamoe.architectures.costs import role_of
from llamamoe.architectures.expert_weighting import EXPERT_KEYS, TOP_K_KEYS, is_routed_down, is_router
from llamamoe.architectures.moe_layout import Heads, Neurons, Router
from llamamoe.architectures.targets import TARGETS
from llamamoe.architectures.targets.base import Target
from llamamoe.checkpoint.tensor_names import IN_MEMORY
from llamamoe.conversion.plan import SplitPlan
from tests.dense import make_dense

ROUTED = [target for target in TARGETS if target.routed]


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[Target]], SplitPlan]:
    """The plan of a conversion to a target, from the first family that it can hold."""
    folder = tmp_path_factory.mktemp("dense")
    variants = ("llama", "qwen3", "granite", "olmo2", "hunyuan_v1_dense", "cohere2", "qwen3_5_text")
    dense = [make_dense(folder / variant, variant, num_attention_heads=8) for variant in variants]

    def get(target: type[Target]) -> SplitPlan:
        shared = 0 if target.shared == "none" else "1x"
        given = {"method": "random", "num_experts": 4, "top_k": 2, "target": target.name, "shared": shared}
        for source in dense:
            try:
                return llamamoe.plan_conversion(source, llamamoe.load_recipe(given=given))
            except llamamoe.RefusedError as error:
                refused = error
        raise refused

    return get


@pytest.mark.parametrize("target", ROUTED, ids=lambda target: target.name)
def test_tensors_are_recognised_by_name(plan_of: Any, target: type[Target]) -> None:
    for tensor in plan_of(target).tensors:
        origin = tensor.origin
        down = isinstance(origin, Neurons) and (origin.part, tensor.role) == ("down", "routed")
        down = down or (isinstance(origin, Heads) and origin.part == "output")
        assert role_of(tensor.name) == tensor.role, f"{tensor.name}: architectures/costs.py"
        assert is_router(tensor.name) == isinstance(tensor.origin, Router), f"{tensor.name}: expert_weighting.py"
        assert is_routed_down(tensor.name) == down, f"{tensor.name}: expert_weighting.py"


@pytest.mark.parametrize("target", ROUTED, ids=lambda target: target.name)
def test_sizes_are_recognised_by_key(plan_of: Any, target: type[Target]) -> None:
    plan = plan_of(target)
    config = target().config(plan.model.spec, plan.layout)
    assert next(config[key] for key in EXPERT_KEYS if key in config) == 4
    assert target.top_k_key in TOP_K_KEYS
    assert config[target.top_k_key] == 2


@pytest.mark.parametrize("target", ROUTED, ids=lambda target: target.name)
def test_names_of_memory_have_names_in_files(target: type[Target]) -> None:
    """Of models that were saved with ``save_original_format=False``."""
    assert target.name in IN_MEMORY
