"""Balanced transport and the soft choice of k: their constraints, their optimum, and derivatives by differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from llamamoe.methods.solvers.transport import balanced_transport, soft_top_k, top_k_threshold, transport_gradient


def logits(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """float64 [rows, columns]."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(function, point: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Central differences of a scalar function, entry by entry."""
    out = torch.zeros_like(point)
    for i in range(point.numel()):
        change = torch.zeros_like(point)
        change.view(-1)[i] = step
        out.view(-1)[i] = (function(point + change) - function(point - change)) / (2 * step)
    return out


@settings(max_examples=8)
@given(st.integers(1, 20), st.integers(1, 6), st.floats(0.5, 3), st.integers(0, 99))
def test_marginals(rows: int, columns: int, temperature: float, seed: int) -> None:
    plan, _ = balanced_transport(logits(rows, columns, seed), temperature, 100)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.ones(rows, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((columns,), rows / columns).double(), rtol=1e-3, atol=1e-5)


def test_it_is_the_entropic_optimum() -> None:
    """``A - tau log P`` is a row potential plus a column potential: the conditions of optimality."""
    a = logits(9, 3)
    plan, prices = balanced_transport(a, 0.5, 100)
    rest = a - 0.5 * plan.log()
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-9
    torch.testing.assert_close(((a - prices) / 0.5).softmax(1), plan)


def test_cold_plans_are_the_exact_assignment() -> None:
    a = logits(12, 4)
    plan, _ = balanced_transport(a, 0.03, 300)
    rows, columns = linear_sum_assignment(-np.repeat(a.numpy(), 3, axis=1))
    assert np.array_equal(plan.argmax(1).numpy()[rows], columns // 3)


def test_prices_take_up_where_they_ended() -> None:
    a = logits(30, 5)
    whole, _ = balanced_transport(a, 0.2, 60)
    _, prices = balanced_transport(a, 0.2, 30)
    again, _ = balanced_transport(a, 0.2, 30, prices)
    torch.testing.assert_close(whole, again)


@pytest.mark.parametrize(("rows", "columns", "temperature"), [(6, 3, 1.0), (4, 2, 0.7), (3, 1, 1.0)])
def test_gradient_by_differences(rows: int, columns: int, temperature: float) -> None:
    a, g = logits(rows, columns), logits(rows, columns, 1)
    plan, _ = balanced_transport(a, temperature, 60)
    expected = differences(lambda p: (balanced_transport(p, temperature, 60)[0] * g).sum(), a)
    torch.testing.assert_close(transport_gradient(plan, g, temperature), expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_hard_plan_is_finite_and_nothing() -> None:
    plan = torch.eye(3).repeat_interleave(2, 0)
    assert transport_gradient(plan, torch.randn(6, 3), 0.1).abs().max() < 1e-3


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_soft_choice(top_k: int) -> None:
    values, g = 3 * logits(4, 5), logits(4, 5, 1)
    soft = soft_top_k(values, top_k)
    torch.testing.assert_close(soft.sum(1), torch.full((4,), float(top_k)).double())
    assert torch.equal(soft.argsort(1), values.argsort(1))
    torch.testing.assert_close((values - top_k_threshold(values, top_k)).sigmoid(), soft)
    cold = soft_top_k(values * 200, top_k)
    torch.testing.assert_close(
        cold, torch.zeros_like(values).scatter_(1, values.topk(top_k, 1).indices, 1.0), atol=1e-3, rtol=0
    )
    point = values.clone().requires_grad_()
    (soft_top_k(point, top_k) * g).sum().backward()
    expected = differences(lambda p: (soft_top_k(p, top_k) * g).sum(), values)
    torch.testing.assert_close(point.grad, expected, rtol=1e-5, atol=1e-7)


def test_all_of_them_or_none() -> None:
    assert torch.equal(soft_top_k(logits(2, 3), 3), torch.ones(2, 3).double())
    with pytest.raises(ValueError, match="3 of 3"):
        top_k_threshold(logits(2, 3), 3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_thresholds_in_single_precision(scale: float) -> None:
    values = (scale * logits(50, 24) + 5).float()
    values[0] = 1.0  # all alike
    assert (soft_top_k(values, 8).sum(1) - 8).abs().max() < 1e-3
