"""Sizes that fit a budget."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llamamoe.errors import RefusedError
from llamamoe.studies.sizes import Sizes, sizes_for_budget


def spec(size: int) -> Any:
    return SimpleNamespace(intermediate_size=size)


def cost(sizes: Sizes, fixed: float) -> float:
    """Multiply-adds per token with a hidden size of 1, over 3: what a neuron costs."""
    gate_up_down = 3 * (sizes.shared + sizes.top_k * sizes.expert_width)
    return (gate_up_down + sizes.num_experts + 3 * fixed) / 3


@given(
    size=st.integers(64, 20_000),
    budget=st.floats(0.1, 1.0),
    experts=st.none() | st.integers(2, 80),
    shared=st.sampled_from([0.0, 0.1, 0.25, 0.4]),
    pad_to=st.sampled_from([8, 32]),
    multiple=st.booleans(),
)
def test_within_the_budget_and_as_written(
    size: int, budget: float, experts: int | None, shared: float, pad_to: int, multiple: bool
) -> None:
    try:
        sizes = sizes_for_budget(spec(size), budget, experts, shared, pad_to, fixed=0.5, multiple=multiple)
    except RefusedError:
        assume(False)
    assert cost(sizes, 0.5) <= budget * size + 1e-6
    assert sizes.share == pytest.approx(cost(sizes, 0.5) / size)
    assert experts in (None, sizes.num_experts)
    assert 1 <= sizes.top_k <= sizes.num_experts
    assert sizes.expert_width % pad_to == 0
    assert sizes.num_experts * sizes.expert_width >= size - sizes.shared, "every neuron has a place"
    assert (sizes.num_experts * (sizes.expert_width - pad_to) < size - sizes.shared) or multiple, "no wider than needed"
    assert (sizes.shared > 0) == (shared > 0)
    if multiple and shared:
        assert sizes.shared % sizes.expert_width == 0
    if sizes.top_k < sizes.num_experts:
        wider = Sizes(sizes.num_experts, sizes.top_k + 1, sizes.expert_width, sizes.shared, 0.0)
        assert cost(wider, 0.5) > budget * size - 1e-6, "one expert more would not fit"


@given(size=st.integers(200, 3000), experts=st.integers(4, 64), budget=st.sampled_from([0.25, 0.5, 0.75]))
def test_no_sizes_with_the_same_shared_neurons_use_more(size: int, experts: int, budget: float) -> None:
    try:
        sizes = sizes_for_budget(spec(size), budget, experts, 0.0, fixed=0.0)
    except RefusedError:
        assume(False)
    width = 8 * math.ceil(math.ceil(size / experts) / 8)
    fitting = [k for k in range(1, experts + 1) if k * width + experts / 3 <= budget * size]
    assert (sizes.expert_width, sizes.top_k) == (width, max(fitting))


@given(size=st.integers(256, 4000), experts=st.integers(4, 64))
def test_the_smallest_budget_that_is_named_is_one(size: int, experts: int) -> None:
    with pytest.raises(RefusedError) as error:
        sizes_for_budget(spec(size), 0.001, experts, 0.2)
    found = re.search(r"the smallest budget is (0\.[0-9]+)", str(error.value))
    if found is None:
        assert "not possible" in str(error.value)
        return
    least = float(found[1])
    assert sizes_for_budget(spec(size), least + 0.001, experts, 0.2).top_k >= 1
    with pytest.raises(RefusedError):
        sizes_for_budget(spec(size), least - 0.002, experts, 0.2)


def test_smollm2_at_half() -> None:
    """By hand: 768 neurons; 24 rows cost 8, the shared gate a third, which leaves 416 + 7 x 48."""
    sizes = sizes_for_budget(spec(1536), 0.5, 24, 0.25)
    assert (sizes.top_k, sizes.expert_width, sizes.shared) == (7, 48, 416)


def test_too_many_experts() -> None:
    with pytest.raises(RefusedError, match="not possible"):
        sizes_for_budget(spec(100), 0.5, 200, 0.0)
