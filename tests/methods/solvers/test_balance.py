"""The balanced assignment against brute force, scipy and POT, and against its own certificate of optimality."""

import itertools

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from llamamoe.methods.solvers.balance import assign_balanced, assign_with_prices


def total(cost: np.ndarray, labels: np.ndarray) -> float:
    return float(cost[np.arange(len(cost)), labels].sum())


def places(capacity, num_clusters: int) -> np.ndarray:
    return np.broadcast_to(capacity, num_clusters)


def check_feasible(labels: np.ndarray, num_points: int, capacity, num_clusters: int) -> None:
    assert labels.dtype == np.int64
    assert labels.shape == (num_points,)
    sizes = np.bincount(labels, minlength=num_clusters)
    assert len(sizes) == num_clusters
    assert (sizes <= places(capacity, num_clusters)).all()


def by_matching(cost: np.ndarray, capacity) -> float:
    """The optimum of the one-to-one problem in which cluster k is repeated capacity[k] times."""
    columns = np.repeat(np.arange(cost.shape[1]), np.minimum(places(capacity, cost.shape[1]), len(cost)))
    rows, chosen = linear_sum_assignment(cost[:, columns])
    return float(cost[rows, columns[chosen]].sum())


def by_transport(cost: np.ndarray, capacity: int) -> float:
    plan = ot.emd(np.ones(len(cost)), np.full(cost.shape[1], float(capacity)), cost, numItermax=10**7)
    return float((plan * cost).sum())


def clustered_cost(num_points: int, num_clusters: int, seed: int) -> np.ndarray:
    """Squared distances of points in lumps of unequal size to some of the points."""
    rng = np.random.default_rng(seed)
    lumps = rng.standard_normal((12, 8)) * 2
    points = lumps[np.minimum(rng.geometric(0.3, num_points) - 1, 11)] + rng.standard_normal((num_points, 8))
    centers = points[rng.choice(num_points, num_clusters, replace=False)]
    return ((points[:, None] - centers) ** 2).sum(2)


@st.composite
def problems(draw):
    """Costs (often with ties, negative values or large scales) and capacities (equal or not, tight or not)."""
    num_clusters = draw(st.integers(1, 6))
    num_points = draw(st.integers(0, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_points, num_clusters)
    cost = {
        "real": rng.standard_normal(shape),
        "ties": rng.integers(-2, 3, shape).astype(float),
        "equal": np.zeros(shape),
        "offsets": rng.random(shape) + rng.integers(0, 4, num_clusters) * 10.0,
        "wide": np.exp(6 * rng.standard_normal(shape)),
    }[draw(st.sampled_from(["real", "ties", "equal", "offsets", "wide"]))]
    slack = draw(st.integers(0, 8))
    split = rng.multinomial(num_points + slack, rng.dirichlet(np.ones(num_clusters)))
    tight = -(-num_points // num_clusters)
    return cost, draw(st.sampled_from([split, tight, tight + slack]))


@settings(max_examples=150)
@given(problems(), st.sampled_from([1.0, 1e-200, 1e200]))
def test_optimal_and_feasible(problem, scale):
    cost, capacity = problem
    labels, prices = assign_with_prices(cost * scale, capacity)
    num_points, num_clusters = cost.shape
    check_feasible(labels, num_points, capacity, num_clusters)
    if not num_points:
        return
    best = by_matching(cost, capacity)
    assert total(cost, labels) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert np.array_equal(labels, assign_balanced(cost * scale, capacity))
    # Complementary slackness: the certificate needs no other solver.
    size = np.abs(cost).max() * scale
    reduced = cost * scale + prices
    assert (reduced[np.arange(num_points), labels] - reduced.min(1)).max() <= 1e-12 * size
    free = np.bincount(labels, minlength=num_clusters) < np.minimum(places(capacity, num_clusters), num_points)
    if num_clusters > 1:
        assert (prices >= 0).all()
        assert prices[free].max(initial=0) <= 1e-12 * size


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**32 - 1))
def test_any_start_prices_give_the_same_total(problem, seed):
    cost, capacity = problem
    start = 3 * np.random.default_rng(seed).standard_normal(cost.shape[1])
    warm = assign_with_prices(cost, capacity, start)[0]
    check_feasible(warm, len(cost), capacity, cost.shape[1])
    assert total(cost, warm) == pytest.approx(total(cost, assign_balanced(cost, capacity)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_brute_force(seed):
    rng = np.random.default_rng(seed)
    cost = rng.standard_normal((6, 3))
    capacity = np.array([3, 1, 2])
    every = (np.array(labels) for labels in itertools.product(range(3), repeat=6))
    best = min(total(cost, labels) for labels in every if (np.bincount(labels, minlength=3) <= capacity).all())
    assert total(cost, assign_balanced(cost, capacity)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("num_points", "num_clusters"), [(1200, 8), (1200, 60), (2048, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pot(num_points, num_clusters, seed):
    cost = clustered_cost(num_points, num_clusters, seed)
    labels = assign_balanced(cost, num_points // num_clusters)
    assert (np.bincount(labels) == num_points // num_clusters).all()
    best = by_transport(cost, num_points // num_clusters)
    assert abs(total(cost, labels) - best) <= 1e-9 * abs(best)


def test_slack_at_size():
    cost = clustered_cost(500, 10, 2)
    for capacity in (51, 70, 300, np.arange(10, 110, 10)):
        labels = assign_balanced(cost, capacity)
        check_feasible(labels, 500, capacity, 10)
        assert total(cost, labels) == pytest.approx(by_matching(cost, capacity), rel=1e-12)


def test_room_for_all_is_the_nearest_cluster():
    cost = np.random.default_rng(0).standard_normal((50, 4))
    assert np.array_equal(assign_balanced(cost, 50), cost.argmin(1))
    assert np.array_equal(assign_balanced(cost, 2**62), cost.argmin(1))


@pytest.mark.parametrize("num_clusters", [16, 64])
def test_many_equal_costs_are_moved_together(num_clusters):
    """Identical points (tied neurons) must not take one chain each: 11008 of them would take minutes."""
    cost = np.tile(np.random.default_rng(0).random(num_clusters), (11008, 1))
    labels = assign_balanced(cost, 11008 // num_clusters)
    assert (np.bincount(labels) == 11008 // num_clusters).all()


def test_number_of_threads_does_not_choose_among_equal_optima():
    cost = np.random.default_rng(0).integers(0, 4, (2048, 32)).astype(float)
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(assign_balanced(cost, 64))
    assert np.array_equal(*results)


def test_all_points_want_one_cluster():
    cost = np.random.default_rng(0).random((1024, 16)) + 10.0 * np.arange(16)
    labels = assign_balanced(cost, 64)
    assert total(cost, labels) == pytest.approx(by_transport(cost, 64), rel=1e-9)


def test_extreme_magnitudes():
    rng = np.random.default_rng(0)
    cost = rng.choice([-1.7e308, -1.0, 0.0, 1.0, 1.7e308], (40, 4))
    labels = assign_balanced(cost, 10)
    scaled = cost / 2.0**1023
    assert total(scaled, labels) == pytest.approx(by_matching(scaled, 10), rel=1e-9)


def test_input_is_left_alone_and_may_be_integer_or_transposed():
    cost = np.random.default_rng(0).integers(-9, 9, (30, 3))
    kept = cost.copy()
    labels = assign_balanced(cost, 10)
    assert np.array_equal(cost, kept)
    assert np.array_equal(labels, assign_balanced(np.asfortranarray(cost.astype(np.float32)), np.int32(10)))
    floats = cost.astype(np.float64)
    floats.flags.writeable = False
    assert np.array_equal(labels, assign_balanced(floats, 10))


def test_no_points_and_one_cluster():
    assert assign_balanced(np.empty((0, 3)), 0).tolist() == []
    assert assign_balanced(np.ones((4, 1)), 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("cost", "capacity", "message"),
    [
        (np.full((2, 2), np.nan), 1, "finite"),
        (np.array([[1.0, np.inf]]), 1, "1 values are not"),
        (np.ones((5, 2)), 2, "5 points do not fit into 4 places"),
        (np.ones((5, 2)), np.array([2, 2]), "5 points do not fit"),
        (np.ones(5), 5, "shape"),
        (np.ones((5, 0)), 5, "shape"),
        (np.ones((5, 2)), np.array([2, 2, 2]), r"shape \(2,\)"),
        (np.ones((5, 2)), 2.5, "integer"),
        (np.ones((5, 2)), np.array([-1, 6]), "negative"),
    ],
)
def test_refuses(cost, capacity, message):
    with pytest.raises(ValueError, match=message):
        assign_balanced(cost, capacity)
