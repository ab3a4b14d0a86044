"""The plan's operations and memory for attention as experts, beside those of a measured run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llamamoe
from benchmarks.meters import CpuMeter
from llamamoe.calibration.walk import Walk
from llamamoe.conversion.attention import convert_attention, heads_as_stored
from llamamoe.conversion.attention_cost import attention_bytes, attention_flops
from llamamoe.conversion.layer import layer_context
from tests.dense import make_dense

from .test_calibrated import CPU, recipe, text_of, write_text

TOKENS, BATCH, LENGTH, N = 2048, 1024, 64, 8
KINDS = [("ridge", "least_squares"), ("random", "least_squares"), ("ridge", "none")]
GIVEN = {"router": "ridge", "repair": "least_squares"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads wider than the rest: 16 of width 16 over 2 key/value heads."""
    folder = make_dense(
        tmp_path_factory.mktemp("cost") / "dense", num_hidden_layers=1, num_attention_heads=16, head_dim=16
    )
    write_text(folder.with_name("text.txt"))
    return folder


def plan_of(dense: Path, **given: Any) -> Any:
    sizes = {"calibration_tokens": TOKENS, "calibration_length": LENGTH, "num_experts": N, "shared": 0}
    return llamamoe.plan_conversion(dense, recipe(dense, **sizes, **given))


@pytest.mark.parametrize(("router", "repair"), KINDS)
def test_operations_and_memory_are_those_of_a_run(
    dense: Path, router: str, repair: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamamoe.conversion.attention_cost.BATCH_TOKENS", BATCH)
    plan = plan_of(dense, target="jetmoe", router=router, repair=repair)
    spec = plan.model.spec
    ids = torch.randint(3, spec.vocab_size, (TOKENS // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    walk = Walk(plan.model, text_of(ids.numpy()), CPU, weights_dtype=torch.float32, batch_tokens=BATCH)
    walk.start()
    meter = CpuMeter()

    def convert(text: Any) -> Any:
        with meter:
            meter.begin()
            heads = convert_attention(plan, 0, layer_context(plan, 0), text).heads
            meter.mark()
        return heads_as_stored(plan, heads)

    counted = []
    for given in (None, convert):
        with FlopCounterMode(display=False) as counter:
            walk.enter(0, given)
        counted.append(counter.get_total_flops())
    dense_pass = (
        counted[0] - 6 * TOKENS * spec.intermediate_size * spec.hidden_size
    )  # the FFN's outputs, for their norm
    told = attention_flops(spec, plan.recipe, N, TOKENS, dense_pass)
    assert told == pytest.approx(counted[1] - counted[0], rel=0.1)
    assert attention_bytes(spec, plan.recipe) == pytest.approx(meter.peak, rel=0.15)


def test_the_plan_counts_attention_beside_the_ffn(dense: Path) -> None:
    plan, alone = (plan_of(dense, target=target, **GIVEN) for target in ("jetmoe", "mixtral"))
    routed, spec = plan.calibration, plan.model.spec
    walked = routed.tokens * (2 * 64 * (2 * 256 + 2 * 32) + 4 * 256 * LENGTH)
    more = attention_flops(spec, plan.recipe, N, routed.tokens, walked)
    assert routed.layer_flops - alone.calibration.layer_flops == more > 4 * walked
    assert routed.peak_bytes > alone.calibration.peak_bytes
