"""The plan's operations of calibration, beside those counted in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llamamoe
from llamamoe.calibration.walk import Walk
from llamamoe.conversion.layer import convert_layer
from tests.dense import make_dense

from .test_calibrated import CPU, recipe, text_of, write_text

LENGTH = 32
METHODS = [
    {"method": "token_clusters", "repair": "distill"},
    {"method": "token_clusters", "repair": "least_squares"},
    {"method": "random", "router": "ridge", "repair": "none"},
    {"method": {"name": "learned", "steps": 40}, "repair": "none"},
]


@pytest.mark.parametrize("methods", METHODS, ids=["distill", "least_squares", "none", "learned"])
def test_operations_are_those_of_a_run(tmp_path: Path, methods: dict[str, Any]) -> None:
    dense = make_dense(tmp_path / "dense", num_hidden_layers=1, hidden_size=128, intermediate_size=384, head_dim=32)
    write_text(tmp_path / "text.txt")
    sizes = {"num_experts": 12, "top_k": 5, "shared": 96, "calibration_length": LENGTH}
    plan = llamamoe.plan_conversion(dense, recipe(dense, **sizes, **methods))
    spec, tokens = plan.model.spec, plan.calibration.tokens
    ids = torch.randint(3, spec.vocab_size, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    walk = Walk(plan.model, text_of(ids.numpy()), CPU, weights_dtype=torch.float32)
    walk.start()
    with FlopCounterMode(display=False) as counter:
        inputs = walk.enter(0)
        moe = convert_layer(plan, 0, inputs).moe
        assert moe is not None
        walk.leave(0, moe.outputs(inputs))
    assert plan.calibration.layer_flops == pytest.approx(counter.get_total_flops(), rel=0.3)
