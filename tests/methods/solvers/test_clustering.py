"""Balanced k-means: sizes, means, inertia, descent, empty clusters, memory."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.methods.solvers.clustering import balanced_kmeans


def blobs(num_blobs: int, each: int, seed: int = 0, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(num_blobs), each))
    points = 3 * np.eye(num_blobs, 16)[truth] + spread * rng.standard_normal((len(truth), 16))
    return points.astype(np.float32), truth


def inertia_of(points: np.ndarray, labels: np.ndarray) -> float:
    points = points.astype(np.float64)
    return sum(((points[labels == k] - points[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels))


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 5), st.integers(0, 1000), st.booleans())
def test_sizes_means_and_inertia(num_points, num_clusters, slack, seed, duplicates):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((num_points, 3)).astype(np.float32)
    if duplicates:
        points = np.round(points)
    capacity = -(-num_points // num_clusters) + slack
    found = balanced_kmeans(points, num_clusters, capacity, seed=seed)
    sizes = np.bincount(found.labels, minlength=num_clusters)
    assert found.labels.shape == (num_points,)
    assert sizes.sum() == num_points
    assert sizes.max() <= capacity
    assert found.inertia == pytest.approx(inertia_of(points, found.labels), rel=1e-4, abs=1e-4)
    assert np.isfinite(found.centers).all()
    for k in np.flatnonzero(sizes):
        np.testing.assert_allclose(found.centers[k], points[found.labels == k].mean(0), atol=1e-5)


def test_finds_equal_blobs():
    points, truth = blobs(6, 40)
    found = balanced_kmeans(points, 6, 40, seed=0, n_init=3)
    assert len({(a, b) for a, b in zip(truth, found.labels, strict=True)}) == 6
    assert found.inertia == pytest.approx(inertia_of(points, truth), rel=1e-4)


def test_a_far_offset_costs_no_digits():
    """Squares of about 1e6 would swallow distances of 1e-3 in float32, were they not taken around the mean."""
    points, _ = blobs(4, 30, spread=0.1)
    here = balanced_kmeans(points, 4, 30, seed=1, n_init=4)
    there = balanced_kmeans(points + np.float32(256), 4, 30, seed=1, n_init=4)
    assert there.inertia == pytest.approx(here.inertia, rel=1e-3)


def test_more_iterations_never_raise_the_inertia():
    points = np.random.default_rng(0).standard_normal((600, 10)).astype(np.float32)
    values = [balanced_kmeans(points, 5, 120, seed=3, max_iter=n, tol=0).inertia for n in range(1, 12)]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(values))
    assert values[-1] < values[0]


def test_stops_at_a_fixed_point():
    points, _ = blobs(3, 20)
    found = balanced_kmeans(points, 3, 20, seed=0, n_init=3, tol=0, max_iter=100)
    again = balanced_kmeans(points, 3, 20, seed=0, initial_centers=found.centers, tol=0)
    assert found.iterations < 100
    assert again.iterations <= 2
    assert np.array_equal(again.labels, found.labels)


def test_same_seed_same_result_and_more_starts_are_no_worse():
    points = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    one, two = (balanced_kmeans(points, 4, 100, seed=5) for _ in range(2))
    assert np.array_equal(one.labels, two.labels)
    assert np.array_equal(one.centers, two.centers)
    assert balanced_kmeans(points, 4, 100, seed=5, n_init=4).inertia <= one.inertia


def test_an_empty_cluster_is_moved():
    """Centre 2 starts where it attracts nothing, and there is room elsewhere; it must end up with a blob."""
    points, truth = blobs(3, 10)
    start = np.stack([points[truth == 0].mean(0), points[truth == 1].mean(0), np.full(16, 100.0)])
    found = balanced_kmeans(points, 3, 30, seed=0, initial_centers=start)
    assert np.bincount(found.labels, minlength=3).tolist() == [10, 10, 10]


def test_fewer_points_than_clusters():
    points = np.eye(3, dtype=np.float32)
    found = balanced_kmeans(points, 5, 1, seed=0)
    assert len(set(found.labels.tolist())) == 3
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_points_are_left_alone():
    points, _ = blobs(3, 10)
    points.flags.writeable = False
    balanced_kmeans(points, 3, 10, seed=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"capacity": 9}, "do not fit"),
        ({"max_iter": 0}, "at least 1"),
        ({"n_init": 0}, "at least 1"),
        ({"num_clusters": 0}, "at least one cluster"),
        ({"initial_centers": np.zeros((2, 16))}, "initial_centers"),
        ({"points": np.full((30, 16), np.nan, np.float32)}, "finite"),
        ({"points": np.zeros((0, 16), np.float32)}, "at least one cluster"),
    ],
)
def test_refuses(kwargs, message):
    points, _ = blobs(3, 10)
    kwargs = {"points": points, "num_clusters": 3, "capacity": 10, "seed": 0, **kwargs}
    with pytest.raises(ValueError, match=message):
        balanced_kmeans(kwargs.pop("points"), kwargs.pop("num_clusters"), kwargs.pop("capacity"), **kwargs)
