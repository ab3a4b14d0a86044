"""Schedules of weights, and the options of distillation that hold them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llamamoe.errors import UsageError
from llamamoe.training.distillation_options import DistillOptions, resolve_layers
from llamamoe.training.schedules import Schedule


def schedule(value: Any) -> Schedule:
    return Schedule.model_validate(value)


def test_a_number_is_the_same_at_every_step_and_is_written_as_a_number() -> None:
    half = schedule(0.5)
    assert [half.value(step, 10) for step in (0, 5, 10, 99)] == [0.5] * 4
    assert half.model_dump(mode="json") == 0.5
    assert schedule({"start": 0.5, "end": 0.5}) == half


def test_linear_and_cosine_against_the_formula() -> None:
    linear = schedule({"start": 2, "end": 1, "steps": 4})
    assert [linear.value(step, 100) for step in range(6)] == [2, 1.75, 1.5, 1.25, 1, 1]
    cosine = schedule({"start": 1, "end": 0, "share": 0.5, "shape": "cosine"})
    for step in range(21):
        wanted = 0.5 * (1 + math.cos(math.pi * step / 10)) if step < 10 else 0.0
        assert cosine.value(step, 20) == pytest.approx(wanted, abs=1e-12)
    assert schedule({"start": 0, "end": 1}).value(5, 10) == 0.5  # all steps


def test_no_steps_at_all_is_the_end() -> None:
    assert schedule({"start": 1, "end": 3}).value(0, 0) == 3
    with pytest.raises(ValueError, match="negative"):
        schedule(1).value(-1, 10)


@given(
    st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 50), st.integers(0, 100), st.sampled_from(["linear", "cosine"])
)
def test_values_stay_between_start_and_end(start: float, end: float, steps: int, step: int, shape: str) -> None:
    found = schedule({"start": start, "end": end, "steps": steps, "shape": shape})
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= found.value(step, 60) <= max(start, end) + slack
    assert found.value(step, 60) <= found.largest + slack
    assert schedule(found.model_dump(mode="json")) == (found if start != end else schedule(start))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("much", "must be a number"),
        (True, "must be a number"),
        (-1, "greater than or equal to 0"),
        (math.nan, "finite"),
        ({"start": 1}, "Field required"),
        ({"start": 1, "end": 0, "steps": 2, "share": 0.1}, "not both"),
        ({"start": 1, "end": 0, "share": 1.5}, "less than or equal to 1"),
        ({"start": 1, "end": 0, "form": "linear"}, "Extra inputs"),
    ],
)
def test_what_is_no_schedule_is_refused(value: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        schedule(value)


def test_options_say_what_they_need() -> None:
    assert not DistillOptions().needs_parent
    ffn = DistillOptions.model_validate({"ffn": {"weight": 1}})
    assert ffn.needs_parent
    assert not ffn.needs_forward
    kl = DistillOptions.model_validate({"kl": {"weight": {"start": 1, "end": 0}, "top_m": 8}})
    assert kl.needs_forward
    assert DistillOptions.model_validate(kl.model_dump(mode="json")) == kl
    with pytest.raises(ValidationError, match="all"):
        DistillOptions.model_validate({"hidden": {"layers": "some"}})


def test_layers_count_from_either_end() -> None:
    assert resolve_layers("all", [1, 2], 4) == (1, 2)
    assert resolve_layers([-1, 0, 3], [1, 2], 4) == (0, 3)
    with pytest.raises(UsageError, match="no layer 4"):
        resolve_layers([4], [1], 4)
