"""Assignments: balanced at every step, and a gradient that is the plan's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.alignment.assignment import Assignment
from llamamoe.methods.layer import LayerContext, Partition
from llamamoe.methods.solvers.transport import balanced_transport

CPU = torch.device("cpu")


def partition(experts: int, width: int, shared: int, omitted: int, padding: int, seed: int) -> tuple[Partition, int]:
    """A random one, and its number of neurons; ``padding`` places of the last experts are empty."""
    routed = experts * width - padding
    size = routed + shared + omitted
    order = np.random.default_rng(seed).permutation(size)
    context = LayerContext(0, experts, 1, width, 0)
    neurons, labels = np.sort(order[:routed]), np.arange(routed) % max(experts, 1)
    rest = np.sort(order[routed : routed + shared]), np.sort(order[routed + shared :])
    if not experts:
        return Partition(np.empty((0, width), np.int64), *rest), size
    made = Partition.from_labels(neurons, labels, context, rest[0])
    return Partition(made.experts, made.shared, rest[1]), size


sizes = st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(0, 4), st.integers(0, 4))


@settings(max_examples=40)
@given(sizes, st.integers(0, 99))
def test_it_begins_with_the_partition_and_stays_one_of_its_sizes(sizes: tuple[int, int, int, int], seed: int) -> None:
    experts, width, shared, omitted = sizes
    padding = min(experts - 1, width - 1)
    start, size = partition(experts, width, shared, omitted, padding, seed)
    context = LayerContext(0, experts, 1, width, 0)
    state = Assignment.of(start, 2.0, CPU)
    first = state.partition(context, None)
    assert np.array_equal(first.experts, start.experts)
    state.assign()
    assert np.array_equal(state.partition(context, None).slots, start.slots)  # the margin holds it
    g = torch.Generator().manual_seed(seed)
    for _ in range(3):
        state.logits_FC += torch.randn(state.logits_FC.shape, generator=g)
        state.assign()
        found = state.partition(context, None)
        found.check(size)
        assert len(found.shared) == shared
        assert len(found.omitted) == omitted
        assert found.experts.shape == start.experts.shape
        plan = state.plan(0.5)
        torch.testing.assert_close(plan.sum(1), torch.ones(size))
        torch.testing.assert_close(
            plan.sum(0),
            torch.from_numpy(np.bincount(state.labels_F, minlength=experts + 2)).float(),
            atol=0.05,
            rtol=0.05,
        )


def test_pruning_is_an_assignment_too() -> None:
    start, _ = partition(0, 0, 5, 7, 0, 0)
    state = Assignment.of(start, 2.0, CPU)
    state.logits_FC[start.omitted[0], 0] += 5.0  # it belongs to those that stay
    state.logits_FC[start.shared[0], 1] += 5.0
    state.assign()
    found = state.partition(LayerContext(0, 8, 2, 0, 0), None)
    assert set(found.shared) == (set(start.shared) - {start.shared[0]}) | {start.omitted[0]}
    assert len(found.omitted) == 7


def test_gradient_is_that_of_the_plan_by_differences() -> None:
    """``d <P(A), G> / dA`` for the converged plan, in places of unequal sizes."""
    start, size = partition(3, 2, 2, 1, 1, 0)
    state = Assignment.of(start, 2.0, CPU)
    g = torch.Generator().manual_seed(1)
    state.logits_FC = (state.logits_FC + 0.3 * torch.randn(state.logits_FC.shape, generator=g)).double()
    gradient = torch.randn(state.logits_FC.shape, generator=g).double()
    for _ in range(20):
        state.plan(0.7)  # each goes on from the prices of the last
    state.pull_back(gradient, 0.7)
    found = state.logits_FC.grad
    assert found is not None
    counts = torch.from_numpy(np.bincount(state.labels_F, minlength=5)).double()

    def value(logits: torch.Tensor) -> float:
        return float((balanced_transport(logits, 0.7, 2000, None, counts)[0] * gradient).sum())

    for index in ((0, 0), (3, 2), (5, 4), (size - 1, 3)):
        step = torch.zeros_like(state.logits_FC)
        step[index] = 1e-4
        slope = (value(state.logits_FC + step) - value(state.logits_FC - step)) / 2e-4
        assert float(found[index]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
