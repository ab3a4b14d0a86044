"""Balanced graph partition against brute force and planted parts."""

from __future__ import annotations

import sys
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.errors import MissingExtraError
from llamamoe.methods.solvers.graph import (
    even_sizes,
    improve_by_swaps,
    inside_weight,
    integer_weights,
    leading_vectors,
    metis_parts,
    partition_graph,
    to_sizes,
)

ONE_EDGE = np.zeros((600, 600), np.float32)
ONE_EDGE[0, 1] = ONE_EDGE[1, 0] = 1


def random_graph(size: int, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).random((size, size)).astype(np.float32)
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    return weights


def plain_inside(weights: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(weights[i, j]) for i, j in combinations(range(len(labels)), 2) if labels[i] == labels[j])


def partition(
    weights: np.ndarray, parts: int, method: str = "spectral", starts: int = 2, sweeps: int = 20
) -> np.ndarray:
    return partition_graph(weights, parts, np.random.default_rng(0), method=method, starts=starts, sweeps=sweeps)


@pytest.mark.parametrize("method", ["spectral", "metis"])
def test_nearly_the_best_two_parts_of_eight(method: str) -> None:
    ratios = []
    for seed in range(20):
        weights = random_graph(8, seed)
        splits = [np.isin(np.arange(8), [0, *rest]).astype(int) for rest in combinations(range(1, 8), 3)]
        best = max(plain_inside(weights, labels) for labels in splits)
        labels = partition(weights, 2, method, starts=4)
        assert np.bincount(labels).tolist() == [4, 4]
        ratios.append(plain_inside(weights, labels) / best)
    assert max(ratios) <= 1 + 1e-6
    assert min(ratios) > 0.95
    assert np.mean(np.array(ratios) > 1 - 1e-6) >= 0.7, "the optimum itself, mostly"


@pytest.mark.parametrize("method", ["spectral", "metis"])
@pytest.mark.parametrize("size", [60, 600])
def test_planted_parts(method: str, size: int) -> None:
    """Noise of the size of the signal in every single edge."""
    rng = np.random.default_rng(size)
    truth = rng.permutation(size) % 4
    weights = random_graph(size, 1) + (truth[:, None] == truth).astype(np.float32)
    np.fill_diagonal(weights, 0)
    labels = partition(weights, 4, method)
    assert len(set(zip(labels, truth, strict=True))) == 4


@pytest.mark.parametrize(("size", "blocks"), [(24, 3), (600, 12)])
def test_blocks_without_any_edge_between(size: int, blocks: int) -> None:
    """As many equal eigenvalues as blocks."""
    truth = np.arange(size) % blocks
    weights = (truth[:, None] == truth).astype(np.float32) - np.eye(size, dtype=np.float32)
    assert len(set(zip(partition(weights, blocks), truth, strict=True))) == blocks


def test_leading_vectors_are_eigenvectors() -> None:
    """The leading values are far from the rest, as those of planted parts are."""
    truth = np.arange(80) % 4
    weights = random_graph(80, 0) + 2 * (truth[:, None] == truth)
    values, vectors = np.linalg.eigh(weights)
    found = leading_vectors(lambda v: weights @ v, 80, 4, np.random.default_rng(0))
    assert (values[-4:] > 2 * values[-5]).all()
    np.testing.assert_allclose(found @ found.T, vectors[:, -4:] @ vectors[:, -4:].T, atol=1e-5)


@pytest.mark.parametrize("weights", [np.zeros((600, 600), np.float32), ONE_EDGE])
def test_nearly_empty_graphs_of_many_vertices(weights: np.ndarray) -> None:
    assert np.bincount(partition(weights, 8, starts=1)).tolist() == [75] * 8


@pytest.mark.parametrize("method", ["spectral", "metis"])
@pytest.mark.parametrize("weights", [np.zeros((9, 9), np.float32), 1 - np.eye(9, dtype=np.float32)])
def test_graphs_that_say_nothing(method: str, weights: np.ndarray) -> None:
    assert sorted(np.bincount(partition(weights, 4, method), minlength=4)) == [2, 2, 2, 3]


@settings(max_examples=40)
@given(st.integers(0, 25), st.integers(1, 7), st.integers(0, 99), st.sampled_from(["spectral", "metis"]))
def test_sizes_are_even(size: int, parts: int, seed: int, method: str) -> None:
    labels = partition(random_graph(size, seed), parts, method, starts=1)
    assert labels.shape == (size,)
    counts = np.bincount(labels, minlength=parts)
    assert len(counts) == parts
    assert counts.max() - counts.min() <= 1


@settings(max_examples=40)
@given(st.integers(2, 20), st.integers(2, 5), st.integers(0, 999))
def test_swaps_end_where_no_swap_gains(size: int, parts: int, seed: int) -> None:
    weights = random_graph(size, seed)
    start = np.random.default_rng(seed).permutation(size) % parts
    labels = improve_by_swaps(weights, start, 1000)
    assert np.array_equal(np.bincount(labels, minlength=parts), np.bincount(start, minlength=parts))
    reached = plain_inside(weights, labels)
    assert reached >= plain_inside(weights, start) - 1e-6
    for i, j in product(range(size), repeat=2):
        swapped = labels.copy()
        swapped[[i, j]] = labels[[j, i]]
        assert plain_inside(weights, swapped) <= reached + 1e-4
    assert inside_weight(weights, labels) == pytest.approx(reached, rel=1e-5)


@pytest.mark.parametrize("sweeps", [0, 1, 2])
def test_more_sweeps_keep_more_inside(sweeps: int) -> None:
    weights, start = random_graph(60, 0), np.arange(60) % 5
    fewer, more = (inside_weight(weights, improve_by_swaps(weights, start, s)) for s in (sweeps, sweeps + 1))
    assert more > fewer


def test_as_few_as_can_be_are_moved_and_the_best_of_them() -> None:
    """Part 0 has two vertices too many. Vertices 1 and 3 belong with part 1, which has the room."""
    weights = np.zeros((8, 8), np.float32)
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    for vertex in (1, 3):
        weights[vertex, 6] = weights[6, vertex] = 1
    moved = to_sizes(weights, labels, even_sizes(8, 2))
    assert moved.tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
    assert to_sizes(weights, moved, even_sizes(8, 2)) is moved


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 999))
def test_moves_are_no_more_than_the_surplus(size: int, parts: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(parts, size=size)
    sizes = even_sizes(size, parts)
    moved = to_sizes(random_graph(size, seed), labels, sizes)
    assert np.array_equal(np.bincount(moved, minlength=parts), sizes)
    surplus = (np.bincount(labels, minlength=parts) - sizes).clip(0).sum()
    assert (moved != labels).sum() == surplus


def test_weights_for_metis_are_in_proportion_and_do_not_overflow() -> None:
    few = integer_weights(np.array([[0, 2, 0.1], [2, 0, 0], [0.1, 0, 0]], np.float32))
    assert few.tolist() == [[0, 10000, 500], [10000, 0, 0], [500, 0, 0]]
    many = integer_weights(np.ones((600, 600), np.float32))
    assert many.dtype == np.int32
    assert len(np.unique(many)) == 1
    assert 2**29 < many.sum(dtype=np.int64) < 2**31
    assert not integer_weights(np.zeros((3, 3), np.float32)).any()


def test_without_metis_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(MissingExtraError, match=r"llamamoe\[graph\]"):
        metis_parts(random_graph(4, 0), 2, np.random.default_rng(0))
