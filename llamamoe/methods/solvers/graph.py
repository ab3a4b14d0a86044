"""Partition a weighted graph into parts of given sizes, with as much weight inside the parts as possible.

Names of sizes: ``F`` vertices, ``K`` parts. The graph is a dense symmetric matrix of weights >= 0 with a zero diagonal.
Since the total weight is fixed, most weight inside means least weight cut. Everything here is numpy.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ...lazy import pymetis, require, scipy
from .balance import assign_balanced

if TYPE_CHECKING:
    from collections.abc import Callable

_SUBSPACE_STEPS = 20
"""Number of iterations; more do not improve the start, on which the following swaps depend little."""
_LEAST_GAIN = 1e-9
"""Minimum gain of a swap as a share of the largest connection, so that rounding cannot cause cycles."""


def even_sizes(count: int, parts: int) -> np.ndarray:
    """Return int64 ``[K]``: sizes that sum to ``count`` and differ by one at most."""
    return np.bincount(np.arange(count) % parts, minlength=parts)


def inside_weight(weights_FF: np.ndarray, labels: np.ndarray) -> float:
    """Return the sum of the weights between vertices of the same part, each edge once."""
    return sum(
        float(weights_FF[np.ix_(part, part)].sum(dtype=np.float64)) / 2
        for part in (np.flatnonzero(labels == p) for p in np.unique(labels))
    )


def partition_graph(
    weights_FF: np.ndarray, num_parts: int, rng: np.random.Generator, *, method: str, starts: int, sweeps: int
) -> np.ndarray:
    """Return int64 ``[F]``: the part of every vertex; the sizes of the parts differ by at most one.

    The best of several starts, each refined by `improve_by_swaps`.

    Args:
        weights_FF: float ``[F, F]``, symmetric, >= 0, zero diagonal.
        num_parts: ``K``.
        rng: Generator of the starts.
        method: ``"spectral"`` (`spectral_parts`) or ``"metis"`` (`metis_parts`).
        starts: Number of starts.
        sweeps: Maximum number of sweeps of the refinement; 0 for none.

    Raises:
        MissingExtraError: METIS is requested and not installed.
    """
    sizes = even_sizes(len(weights_FF), num_parts)
    if len(weights_FF) == 0 or num_parts == 1:
        return np.zeros(len(weights_FF), np.int64)
    prepare: Callable[[np.ndarray, int, np.random.Generator], Callable[[int], np.ndarray]]
    prepare = metis_parts if method == "metis" else spectral_parts
    start = prepare(weights_FF, num_parts, rng)
    seeds = [int(seed) for seed in rng.integers(2**31, size=starts)]
    tries = [improve_by_swaps(weights_FF, to_sizes(weights_FF, start(seed), sizes), sweeps) for seed in seeds]
    return max(tries, key=lambda labels: inside_weight(weights_FF, labels))


def spectral_parts(weights_FF: np.ndarray, num_parts: int, rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    """Return a function of a seed: balanced k-means of the rows of ``D^-1/2 W D^-1/2``'s K leading eigenvectors.

    Rows are normalised to length 1. Reference: Ng, Jordan and Weiss, On spectral clustering (2001). O(F^2 K) per step.
    """
    from .clustering import balanced_kmeans

    degree = weights_FF.sum(1, dtype=np.float64)
    inverse_F1 = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1.0)), 0.0)[:, None]

    def multiply(vectors: np.ndarray) -> np.ndarray:
        # In the graph's own dtype, because numpy would copy it otherwise.
        return np.asarray(inverse_F1 * (weights_FF @ (inverse_F1 * vectors).astype(weights_FF.dtype)))

    vectors = leading_vectors(multiply, len(degree), num_parts, rng)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = (vectors / np.where(length > 0, length, 1.0)).astype(np.float32)
    capacity = even_sizes(len(rows), num_parts)

    def start(seed: int) -> np.ndarray:
        return balanced_kmeans(rows, num_parts, capacity, seed=seed, tol=0.0).labels

    return start


def leading_vectors(
    multiply: Callable[[np.ndarray], np.ndarray], size: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Return float64 ``[F, count]``: eigenvectors of the largest eigenvalues of a symmetric matrix, for clustering.

    Subspace iteration with twice as many vectors, and a Rayleigh-Ritz step at the end: it never fails, whatever the
    graph (Lanczos' method stops on graphs with many equal eigenvalues, such as unconnected parts), and nearly equal
    eigenvectors that it has not separated do no harm here.

    Args:
        multiply: Multiplies the matrix by ``[F, any]``.
        size: ``F``.
        count: Number of vectors; fewer are returned if F is smaller.
        rng: Generator of the start.
    """
    basis = np.linalg.qr(rng.standard_normal((size, min(2 * count + 8, size))))[0]
    for _ in range(_SUBSPACE_STEPS):
        basis = np.linalg.qr(multiply(basis))[0]
    small = basis.T @ multiply(basis)
    vectors = np.linalg.eigh((small + small.T) / 2)[1]
    return np.asarray(basis @ vectors[:, ::-1][:, :count])


def metis_parts(weights_FF: np.ndarray, num_parts: int, rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    """Return METIS' multilevel k-way partition, as a function of a seed; the sizes are only nearly even.

    Reference: Karypis and Kumar, A fast and high quality multilevel scheme for partitioning irregular graphs (1998).

    Raises:
        MissingExtraError: The package pymetis is not installed.
    """
    require("pymetis", "graph", "Partitioning with METIS")
    edges = scipy.sparse.csr_array(integer_weights(weights_FF))
    graph = pymetis.CSRAdjacency(edges.indptr, edges.indices)

    def start(seed: int) -> np.ndarray:
        if edges.nnz == 0:
            return np.arange(len(weights_FF)) % num_parts
        options = pymetis.Options(seed=seed)
        found = pymetis.part_graph(num_parts, graph, eweights=edges.data, recursive=False, options=options)
        return np.asarray(found.vertex_part, np.int64)

    return start


def integer_weights(weights_FF: np.ndarray) -> np.ndarray:
    """Return int32 ``[F, F]``: the weights for METIS; those that round to 0 are not edges.

    The largest becomes 10^4, or less so that the sum stays below 2^30: METIS adds weights up in int32.
    """
    largest, total = float(weights_FF.max()), float(weights_FF.sum(dtype=np.float64))
    scale = min(1e4 / largest, 2.0**30 / total) if largest > 0 else 0.0
    return np.rint(weights_FF * scale).astype(np.int32)


def connections(weights_FF: np.ndarray, labels: np.ndarray, num_parts: int) -> np.ndarray:
    """Return float64 ``[F, K]``: the weight between each vertex and each part."""
    member = np.zeros((len(labels), num_parts), weights_FF.dtype)
    member[np.arange(len(labels)), labels] = 1
    return np.asarray(weights_FF @ member, np.float64)


def to_sizes(weights_FF: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return int64 ``[F]``: labels with exactly the given sizes (in sum F), changed for as few vertices as possible.

    Among these, the labels keep most weight between the vertices and the original parts
    (moves count as if made one at a time).
    """
    if np.array_equal(np.bincount(labels, minlength=len(sizes)), sizes):
        return labels
    cost = -connections(weights_FF, labels, len(sizes))
    # More than any chain of moves could gain.
    cost[np.arange(len(labels)), labels] -= 1 + 2 * len(sizes) * np.abs(cost).max()
    return assign_balanced(cost, sizes)


def improve_by_swaps(weights_FF: np.ndarray, labels: np.ndarray, sweeps: int) -> np.ndarray:
    """Return int64 ``[F]``: labels of the same sizes after swaps of two vertices that each increased the inside weight.

    For every pair of parts p, q the best swap is made while it gains, where swapping i of p with j of q gains
    ``(c_iq - c_ip) + (c_jp - c_jq) - 2 w_ij`` with ``c`` the `connections` (Kernighan and Lin, An efficient heuristic
    procedure for partitioning graphs, 1970, without their uphill moves). Ends when no pair of parts has such a swap
    left, or after ``sweeps`` sweeps over the pairs. A pair costs O((F/K)^2), a swap O(F) more.
    """
    num_parts = int(labels.max()) + 1
    labels, own = labels.copy(), connections(weights_FF, labels, num_parts)
    least = _LEAST_GAIN * max(float(own.max()), np.finfo(np.float64).tiny)
    stale = np.ones(num_parts, bool)
    for _ in range(sweeps):
        changed = np.zeros(num_parts, bool)
        for p, q in combinations(range(num_parts), 2):
            if (stale[p] or stale[q] or changed[p] or changed[q]) and _swap_all(weights_FF, labels, own, p, q, least):
                changed[[p, q]] = True
        if not changed.any():
            break
        stale = changed
    return labels


def _swap_all(weights_FF: np.ndarray, labels: np.ndarray, own_FK: np.ndarray, p: int, q: int, least: float) -> bool:
    """Make the best swap between parts p and q while it gains more than ``least``; labels and connections change."""
    left, right = np.flatnonzero(labels == p), np.flatnonzero(labels == q)
    if len(left) == 0 or len(right) == 0:
        return False
    between = 2 * weights_FF[np.ix_(left, right)]
    any_swap = False
    while True:
        gain_left = own_FK[left, q] - own_FK[left, p]
        gain_right = own_FK[right, p] - own_FK[right, q]
        gains = gain_left[:, None] + gain_right - between
        a, b = divmod(int(gains.argmax()), len(right))
        if not gains[a, b] > least:
            return any_swap
        i, j = left[a], right[b]
        change = weights_FF[:, j].astype(np.float64) - weights_FF[:, i]
        own_FK[:, p] += change
        own_FK[:, q] -= change
        labels[i], labels[j] = q, p
        left[a], right[b] = j, i
        between[a] = 2 * weights_FF[j, right]
        between[:, b] = 2 * weights_FF[left, i]
        any_swap = True
