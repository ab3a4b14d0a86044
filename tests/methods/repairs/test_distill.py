"""Distillation of one layer: gradients, descent, what must stay as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import PADDING, FfnWeights, Partition
from llamamoe.methods.repairs.distill import Distill
from llamamoe.methods.repairs.least_squares import LeastSquares
from tests.converted import HIDDEN, NEURONS, make_context, make_ffn, make_inputs, make_moe, make_partition, plain_error

SOFT = {"scale": "soft", "weighting": "sigmoid", "factor": 2.0}


def error(moe: Any, ffn: FfnWeights, inputs: Any, weights: Any) -> float:
    """Mean square error relative to the residual stream, written out."""
    after = replace(moe, weights=weights)
    scale = 1 / inputs.residual_scale_T.double().numpy()
    return float(np.square(plain_error(after, ffn, inputs.x_TH, weights.down_HP) * scale[:, None]).sum())


@pytest.mark.parametrize("kind", ["padded", "overlap", "plain"])
@pytest.mark.parametrize("keys", [{}, SOFT])
def test_better_than_the_least_squares_it_begins_with(kind: str, keys: dict[str, Any]) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind), **keys)
    context = make_context(moe, inputs)
    first = LeastSquares(LeastSquares.Options(ridge=0.02, weighting="residual")).repair(moe, ffn, context)
    after = Distill(Distill.Options(epochs=60, batch=50)).repair(moe, ffn, context)
    assert error(moe, ffn, inputs, after) < 0.8 * error(moe, ffn, inputs, first)
    padding = torch.from_numpy(moe.partition.slots == PADDING)
    for part in (after.gate_PH[padding], after.up_PH[padding], after.down_HP[:, padding]):
        assert not part.any()
    assert all(w.dtype == torch.float32 for w in (after.gate_PH, after.up_PH, after.down_HP))


def test_a_step_goes_down_the_true_gradient() -> None:
    """One step of Adam moves every weight against the sign of the gradient that finite differences give."""
    ffn, inputs = make_ffn(), make_inputs(tokens=30)
    moe = make_moe(ffn)
    context = make_context(moe, inputs)
    # a ridge so strong that the least squares changes next to nothing
    options = Distill.Options(epochs=1, batch=30, lr=1e-4, ridge=1e9)
    after = Distill(options).repair(moe, ffn, context)
    step = 1e-3
    for name in ("gate_PH", "up_PH", "down_HP"):
        before = getattr(moe.weights, name)
        moved = getattr(after, name) - before
        for index in [(0, 0), (3, 2), (7, 5)]:
            at = index if name != "down_HP" else index[::-1]
            sides = []
            for sign in (1, -1):
                changed = before.clone()
                changed[at] += sign * step
                sides.append(error(moe, ffn, inputs, replace(moe.weights, **{name: changed})))
            slope = (sides[0] - sides[1]) / (2 * step)
            if abs(slope) > 1e-3:
                assert np.sign(float(moved[at])) == -np.sign(slope), (name, at)


def test_a_planted_layer_is_found_again() -> None:
    """All experts selected and slightly wrong weights: descent comes back to (nearly) no error."""
    ffn, inputs = make_ffn(), make_inputs(tokens=400)
    inputs = replace(inputs, residual_scale_T=torch.ones(400))
    moe = make_moe(ffn, make_partition("plain"), top_k=4)
    g = torch.Generator().manual_seed(5)
    wrong = replace(moe.weights, gate_PH=moe.weights.gate_PH + 0.1 * torch.randn(NEURONS, HIDDEN, generator=g))
    off = replace(moe, weights=wrong)
    context = make_context(off, inputs)
    first = LeastSquares(LeastSquares.Options(ridge=0.02, weighting="residual")).repair(off, ffn, context)
    after = Distill(Distill.Options(epochs=300, batch=50)).repair(off, ffn, context)
    assert error(off, ffn, inputs, after) < 0.1 * error(off, ffn, inputs, first)


def test_repeatable_and_nearly_the_same_for_any_batch_of_the_walk() -> None:
    ffn = make_ffn()
    moe = make_moe(ffn)
    runs = [
        Distill(Distill.Options(epochs=3, batch=32)).repair(moe, ffn, make_context(moe, make_inputs(batch_tokens=b)))
        for b in (64, 64, 17)
    ]
    assert torch.equal(runs[0].gate_PH, runs[1].gate_PH)
    torch.testing.assert_close(runs[0].gate_PH, runs[2].gate_PH, rtol=1e-3, atol=1e-3)


def test_fewer_tokens_than_a_batch() -> None:
    ffn, inputs = make_ffn(), make_inputs(tokens=20)
    moe = make_moe(ffn)
    after = Distill(Distill.Options(epochs=30)).repair(moe, ffn, make_context(moe, inputs))
    assert error(moe, ffn, inputs, after) < error(moe, ffn, inputs, moe.weights)


def test_nan_names_layer() -> None:
    ffn, inputs = make_ffn(), make_inputs(tokens=40)
    inputs.x_TH[3, 2] = float("nan")
    moe = make_moe(ffn)
    with pytest.raises(LlamaMoeError, match="layer 3"):
        Distill().repair(moe, ffn, make_context(moe, inputs))


def test_a_layer_without_experts_is_distilled_too() -> None:
    """As static pruning makes it: the kept neurons learn to stand in for the omitted ones."""
    ffn, inputs = make_ffn(), make_inputs()
    kept = np.arange(12)
    partition = Partition(np.empty((0, 0), np.int64), kept, np.arange(12, NEURONS))
    moe = make_moe(ffn, partition, router_NH=torch.zeros(0, HIDDEN), top_k=0, factor=1.0)
    context = make_context(moe, inputs)
    first = LeastSquares(LeastSquares.Options(ridge=0.02, weighting="residual")).repair(moe, ffn, context)
    after = Distill(Distill.Options(epochs=60, batch=50)).repair(moe, ffn, context)
    assert error(moe, ffn, inputs, after) < 0.8 * error(moe, ffn, inputs, first)


@pytest.mark.parametrize("begin", [{"ridge": "auto"}, {"ridge": "auto", "penalty": "balanced"}])
def test_it_can_begin_with_a_strength_chosen_on_held_out_tokens(begin: dict[str, Any]) -> None:
    """With hardly a step only the least squares that it begins with is left."""
    ffn, inputs = make_ffn(), make_inputs(400)
    moe = make_moe(ffn)
    context = make_context(moe, inputs)
    first = LeastSquares(LeastSquares.Options(weighting="residual", **begin)).repair(moe, ffn, context)
    after = Distill(Distill.Options(epochs=1, lr=1e-9, **begin)).repair(moe, ffn, context)
    torch.testing.assert_close(after.down_HP, first.down_HP, rtol=1e-5, atol=1e-7)
    usual = Distill(Distill.Options(epochs=1, lr=1e-9)).repair(moe, ffn, context)
    assert not torch.allclose(usual.down_HP, after.down_HP, rtol=1e-3)
