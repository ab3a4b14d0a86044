"""Balanced k-means: clusters of limited size, each assignment step solved exactly.

Names of sizes: ``T`` points, ``D`` dimensions, ``K`` clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...lazy import sklearn
from .balance import assign_with_prices

_SAMPLE = 1024
_SAMPLE_PER_CLUSTER = 16
"""K-means++ samples this many points in total, or this many per cluster if that is more."""


@dataclass(frozen=True)
class BalancedClusters:
    """A balanced clustering.

    Attributes:
        labels: int64 ``[T]``.
        centers: float32 ``[K, D]``, the mean of each cluster (of an empty one, its last position).
        inertia: Sum of the squared distances of the points to the means of their clusters.
        iterations: Assignment steps of the start that was kept.
    """

    labels: np.ndarray
    centers: np.ndarray
    inertia: float
    iterations: int


def balanced_kmeans(
    points: np.ndarray,
    num_clusters: int,
    capacity: int | np.ndarray,
    *,
    seed: int,
    initial_centers: np.ndarray | None = None,
    n_init: int = 1,
    max_iter: int = 50,
    tol: float = 1e-3,
) -> BalancedClusters:
    """Cluster points so that the squared distances to the cluster means are small and no cluster is overfull.

    Starts from k-means++ centres (chosen among a sample of the points), then alternates the exact assignment
    (`assign_balanced`) with the update of the means; neither step can raise the inertia. An empty cluster (possible
    if there are more places than points) is moved to the point that is farthest from its own centre.

    An iteration takes one matrix product of O(T K D) in float32, one pass over the points, and one assignment, which
    starts from the prices of the one before. Memory beside ``points``: one copy of them. Repeatable for the same
    seed, versions and number of BLAS threads.

    Args:
        points: float32 ``[T, D]``, finite.
        num_clusters: ``K``.
        capacity: Places per cluster, one number or int ``[K]``; in sum at least T.
        seed: For the start.
        initial_centers: ``[K, D]`` to start from instead of k-means++ (then there is one start).
        n_init: Number of starts; the one of the least inertia is kept.
        max_iter: Maximum number of assignment steps per start, at least 1.
        tol: Stop when a step gains less than this share of the inertia explained so far (that of
            one single cluster minus theirs); 0 continues until nothing changes.

    Raises:
        ValueError: Wrong shapes, values that are not finite, fewer places than points, or no iteration allowed.
    """
    if points.ndim != 2 or len(points) == 0 or num_clusters < 1:
        raise ValueError(f"need points [T >= 1, D] and at least one cluster, not {points.shape}, {num_clusters}")
    if max_iter < 1 or n_init < 1:
        raise ValueError(f"max_iter and n_init must be at least 1, not {max_iter} and {n_init}")
    mean = points.mean(0, dtype=np.float64).astype(np.float32)
    if not np.isfinite(mean).all():
        raise ValueError("points must be finite")
    # Centred, so that distances computed from scalar products lose no digits to a common offset.
    centred = np.subtract(points, mean, dtype=np.float32)
    if initial_centers is not None:
        if initial_centers.shape != (num_clusters, points.shape[1]):
            raise ValueError(f"initial_centers must be [{num_clusters}, D], not {initial_centers.shape}")
        starts = [np.subtract(initial_centers, mean, dtype=np.float32)]
    else:
        rng = np.random.default_rng(seed)
        starts = [_plus_plus(centred, num_clusters, rng) for _ in range(n_init)]
    total = float(np.einsum("td,td->t", centred, centred).sum(dtype=np.float64))
    runs = [_run(centred, total, start, capacity, max_iter, tol) for start in starts]
    best = min(runs, key=lambda run: run.inertia)
    return BalancedClusters(best.labels, best.centers + mean, best.inertia, best.iterations)


def _plus_plus(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Choose k-means++ centres among a sample of the points; with fewer points than clusters some serve twice."""
    # On all points of a large FFN this would take longer than the clustering that follows.
    size = min(len(points), max(_SAMPLE, _SAMPLE_PER_CLUSTER * num_clusters))
    sample = points[np.sort(rng.choice(len(points), size, replace=False))]
    count = min(num_clusters, size)
    # sklearn's KMeans could continue from here, but it adds up its threads' sums in the order in which they end.
    centers, _ = sklearn.cluster.kmeans_plusplus(sample, count, random_state=int(rng.integers(2**32)))
    return np.asarray(centers[np.arange(num_clusters) % count])


def _run(
    points: np.ndarray,
    total: float,
    centers: np.ndarray,
    capacity: int | np.ndarray,
    max_iter: int,
    tol: float,
) -> BalancedClusters:
    """Alternate assignment and means from the given centres. ``total`` is the points' sum of squares."""
    prices: np.ndarray | None = None
    labels = np.full(len(points), -1, np.int64)
    explained = -np.inf
    iterations = 0
    while iterations < max_iter:
        iterations += 1
        before, explained_before = labels, explained
        cost = _distances(points, centers)
        labels, prices = assign_with_prices(cost, capacity, prices)
        if np.array_equal(labels, before):
            break
        sizes = np.bincount(labels, minlength=len(centers))
        centers = _means(points, labels, sizes, centers)
        explained = float(sizes @ np.einsum("kd,kd->k", centers, centers, dtype=np.float64))
        if (sizes == 0).any():
            centers = _reseed(points, labels, sizes, centers)
        elif explained - explained_before <= tol * explained:
            break
    return BalancedClusters(labels, centers, max(total - explained, 0.0), iterations)


def _distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return float64 ``[T, K]``: squared distances without the point's own square, equal for all clusters."""
    squares = np.einsum("kd,kd->k", centers, centers, dtype=np.float64)
    return np.asarray(squares - 2 * (points @ centers.T).astype(np.float64))


def _means(points: np.ndarray, labels: np.ndarray, sizes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return float32 ``[K, D]``: the mean of each cluster; the old centre of an empty one."""
    means = centers.copy()
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(sizes)
    for cluster in np.flatnonzero(sizes):
        members = order[ends[cluster] - sizes[cluster] : ends[cluster]]
        means[cluster] = points[members].mean(0)
    return means


def _reseed(points: np.ndarray, labels: np.ndarray, sizes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return centres with each empty cluster moved to another of the points farthest from their centres."""
    own = np.einsum("td,td->t", points, points) + _distances(points, centers)[np.arange(len(points)), labels]
    farthest = np.argsort(-own, kind="stable")
    # A point of a cluster of one is its centre: moving there would only exchange the two clusters.
    farthest = farthest[sizes[labels[farthest]] > 1]
    empty = np.flatnonzero(sizes == 0)[: len(farthest)]
    moved = centers.copy()
    moved[empty] = points[farthest[: len(empty)]]
    return moved
