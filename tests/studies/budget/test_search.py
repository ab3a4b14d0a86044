"""Dense sets and shared neurons under a budget, against trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.architectures.targets import TARGETS
from llamamoe.architectures.targets.base import Target
from llamamoe.errors import RefusedError
from llamamoe.studies.budget.search import (
    DenseForm,
    cheapest_choices,
    dense_layers,
    dense_sets,
    least_damage,
    share_out,
    share_out_top_k,
)
from llamamoe.studies.budget.sensitivities.curves import Curves
from llamamoe.studies.sizes import Sizes

LAYERS = 6
damages = st.lists(st.floats(0.01, 10), min_size=LAYERS, max_size=LAYERS)
FORMS: list[DenseForm] = ["none", "leading", "ends", "any"]


def target_of(form: str) -> type[Target]:
    return next(t for t in TARGETS if t.routed and t.dense_layers == form)


def fit(budget: float) -> Sizes:
    """Sizes in steps of a twentieth, at least a tenth."""
    steps = math.floor(20 * budget + 1e-9)
    if steps < 2:
        raise RefusedError("too small")
    return Sizes(4, 1, 8, steps, steps / 20)


def allowed(form: DenseForm) -> list[tuple[int, ...]]:
    """Every set that a target of this form does not refuse, all layers left out."""
    target = target_of(form)()
    sets = itertools.chain.from_iterable(itertools.combinations(range(LAYERS), n) for n in range(LAYERS))
    return [each for each in sets if target.dense_layer_refusal(each, LAYERS) is None]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(small=damages, large=damages, budget=st.floats(0.12, 0.95))
def test_the_dense_set_is_the_best_of_all(
    form: DenseForm, small: list[float], large: list[float], budget: float
) -> None:
    curves = Curves(np.array([0.3, 0.6]), np.array([np.maximum(small, large), small]))
    found = least_damage(dense_sets(curves, budget, form, fit))
    best = math.inf
    for layers in allowed(form):
        rest = (LAYERS * budget - len(layers)) / (LAYERS - len(layers))
        try:
            share = fit(rest).share  # which says what fits, rounding included
        except RefusedError:
            continue
        damage = curves.at(share)
        best = min(best, sum(damage[i] for i in range(LAYERS) if i not in layers))
    assert found.damage == pytest.approx(best)
    assert found.layers in allowed(form)
    cost = sum(1.0 if i in found.layers else found.sizes.share for i in range(LAYERS)) / LAYERS
    assert found.share == pytest.approx(cost)
    assert cost <= budget + 1e-9


def test_one_layer_that_loses_everything_stays_dense() -> None:
    curves = Curves(np.array([0.5]), np.array([[100.0, 1, 1, 1, 1, 1]]))
    for form in ("leading", "ends", "any"):
        assert least_damage(dense_sets(curves, 0.5, form, fit)).layers == (0,)  # type: ignore[arg-type]
    assert [each.layers for each in dense_sets(curves, 0.5, "none", fit)] == [()]


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(RefusedError, match="too small"):
        dense_sets(Curves(np.array([0.5]), np.ones((1, 3))), 0.05, "any", fit)


def test_of_equal_layers_the_first_stay_dense() -> None:
    assert dense_layers(np.ones(4), 2, "any") == (0, 1)
    assert dense_layers(np.ones(4), 2, "ends") == (0, 1)
    assert dense_layers(np.array([3.0, 0, 0, 2.0]), 2, "ends") == (0, 3)
    assert dense_layers(np.array([0.0, 3, 2, 1]), 1, "leading") == (0,)


@settings(max_examples=40)
@given(
    costs=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    damage=st.lists(st.floats(0, 5), min_size=12, max_size=12),
    capacity=st.integers(0, 15),
)
def test_choices_are_the_best_of_all(costs: list[int], damage: list[float], capacity: int) -> None:
    table = np.array(damage).reshape(3, 4)
    found = cheapest_choices(costs, table, capacity)
    possible = [c for c in itertools.product(range(3), repeat=4) if sum(costs[i] for i in c) <= capacity]
    if not possible:
        assert found is None
        return
    assert found is not None
    assert sum(costs[i] for i in found) <= capacity
    best = min(sum(table[i, layer] for layer, i in enumerate(c)) for c in possible)
    assert sum(table[i, layer] for layer, i in enumerate(found)) == pytest.approx(best)


@settings(max_examples=20)
@given(size=damages, budget=st.floats(0.3, 0.9))
def test_shared_neurons_follow_sensitivity_within_the_budget(size: list[float], budget: float) -> None:
    curves = Curves(np.array([0.5]), np.array([size]))
    neurons, fixed = 64, 10.5
    found = share_out(curves, budget, neurons, fixed, unit=8, routed=8)
    assert found is not None
    shared, damage = found
    cost = sum(neurons if s == neurons else s + fixed for s in shared)
    assert cost <= LAYERS * budget * neurons + 1e-6
    assert damage == pytest.approx(sum(curves.at((s + fixed) / neurons)[i] for i, s in enumerate(shared)))
    alike = max(s for s in range(0, 57, 8) if s + fixed <= budget * neurons + 1e-9)
    assert damage <= curves.at((alike + fixed) / neurons).sum() + 1e-9, "at least as good as all alike"
    order = np.argsort(size)
    assert (np.diff(np.array(shared)[order]) >= 0).all() or len(set(size)) < LAYERS, "who loses more gets more"


@settings(max_examples=25)
@given(
    small=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    large=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    experts=st.integers(2, 6),
    data=st.data(),
)
def test_a_k_for_each_layer_is_the_best_of_all(
    small: list[float], large: list[float], experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    curves = Curves(np.array([0.3, 0.6]), np.array([np.maximum(small, large), small]))
    shares = [0.2 + 0.7 * k / experts for k in range(1, experts + 1)]
    found, damage = share_out_top_k(curves, shares, top_k)
    damages = [curves.at(share) for share in shares]

    def total(chosen: tuple[int, ...]) -> float:
        return math.fsum(damages[k - 1][layer] for layer, k in enumerate(chosen))

    every = [c for c in itertools.product(range(1, experts + 1), repeat=3) if sum(c) <= 3 * top_k]
    assert found in every, "never above the total"
    assert damage == pytest.approx(total(found))
    assert damage == pytest.approx(min(map(total, every)))
    assert damage <= total((top_k,) * 3) + 1e-12, "never worse than one k for all layers"


def test_no_grid_point_fits() -> None:
    assert share_out(Curves(np.array([0.5]), np.ones((1, 3))), 0.1, 64, 10.5, 8, 8) is None
