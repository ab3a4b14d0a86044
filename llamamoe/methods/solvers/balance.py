"""Assign points to clusters of limited size exactly: the transportation problem, for few clusters.

Names of sizes: ``T`` points, ``K`` clusters. Everything here is numpy.

Algorithm:

1. Prices, one per cluster, are guessed so that the sizes are nearly right (`_guess_prices`). A bad guess
   costs time, never quality.
2. Every point goes to the cluster where ``cost + price`` is least: the cheapest assignment *for those sizes*.
3. While a cluster is too full, points are passed on along the cheapest chain of clusters that ends at a free
   place (`_Chains`). This is what successive shortest paths do in a flow network, and it keeps the assignment
   the cheapest one for the sizes that it has.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ...lazy import threadpoolctl

_TEMPERATURES = (0.25, 0.06, 0.015, 0.004, 0.001)
"""Smoothing temperatures of the price guess, in units of the mean cost above each point's cheapest cluster."""
_NEWTON_STEPS = 3
_CLOSE_ENOUGH = 0.02
"""Share of misplaced points below which the guess at one temperature ends."""


def assign_balanced(cost: np.ndarray, capacity: int | np.ndarray) -> np.ndarray:
    """Assign every point to one cluster, at most ``capacity`` points to each, at the least total cost.

    The result is an optimum of the transportation problem (one of its optima is integral), up to the rounding of
    float64. Proof: an assignment is the cheapest for its sizes if and only if no cycle of moves between clusters
    lowers the cost. Initially there is none, since each point is where ``cost + price`` is least, and sending
    a point along a *shortest* chain creates none. Reference: Ahuja, Magnanti and Orlin, Network Flows (1993),
    section 9.7, successive shortest path algorithm; here on the graph of the K clusters, in which the arc a -> b
    costs as much as the cheapest move of a point of a to b.

    The price guess takes 10 to 30 steps of O(T K^2) (one matrix product each); a chain takes O(K^2), and O(T) for
    each cluster in it. There are usually fewer chains than clusters, at worst T. Memory: about three copies of
    ``cost``.

    Deterministic for equal costs too, and for any number of threads.

    Args:
        cost: ``[T, K]``, finite; negative values are fine.
        capacity: Places per cluster, one number for all or int ``[K]``; in sum at least T.

    Returns:
        int64 ``[T]``, the cluster of each point.

    Raises:
        ValueError: The shapes do not match, a cost is not finite, or there are fewer places than points.
    """
    return assign_with_prices(cost, capacity)[0]


def assign_with_prices(
    cost: np.ndarray, capacity: int | np.ndarray, prices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Assign points as `assign_balanced` does, also taking and returning the prices of the clusters.

    Args:
        cost: As in `assign_balanced`.
        capacity: As in `assign_balanced`.
        prices: float ``[K]`` to start from, such as those of a similar problem; they only change the time (and
            which of several optima is found).

    Returns:
        The labels, and float64 ``[K]`` prices >= 0 that prove the optimum: each point is in a cluster where
        ``cost + price`` is least, and a cluster with free places has price 0 (both up to rounding).
    """
    cost, places = _checked(cost, capacity)
    num_points, num_clusters = cost.shape
    if num_points == 0 or num_clusters == 1:
        return np.zeros(num_points, np.int64), np.zeros(num_clusters)
    work, exponent = _normalised(cost)
    start = _first_prices(work, places) if prices is None else _in_range(np.ldexp(prices, -exponent))
    # A chain costs as much as a few columns of one Newton step, so a small surplus does not need better prices.
    if _surplus(work, places, start) > 2 * num_clusters:
        start = _guess_prices(work, places, start, _TEMPERATURES if prices is None else _TEMPERATURES[2:])
    chains = _Chains(work, places, start)
    chains.run()
    return chains.labels, np.ldexp(chains.prices - chains.prices.min(), exponent)


def _checked(cost: np.ndarray, capacity: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs as float64 ``[T, K]`` and int64 ``[K]``, or raise ValueError."""
    cost = np.asarray(cost)
    if cost.ndim != 2 or cost.shape[1] == 0:
        raise ValueError(f"cost must have shape [points, clusters] with at least one cluster, not {cost.shape}")
    cost = cost.astype(np.float64, order="C", copy=False)
    if not np.isfinite(cost).all():
        raise ValueError(f"cost must be finite, but {np.count_nonzero(~np.isfinite(cost))} values are not")
    places = np.asarray(capacity)
    if not np.issubdtype(places.dtype, np.integer):
        raise ValueError(f"capacity must be an integer or an array of integers, not {places.dtype}")
    if places.shape not in {(), (cost.shape[1],)}:
        raise ValueError(f"capacity must be one number or have shape ({cost.shape[1]},), not {places.shape}")
    # More places than points in one cluster are never used; the cut also keeps the sum from overflowing.
    places = np.broadcast_to(np.minimum(places, len(cost)), cost.shape[1]).astype(np.int64)
    if places.min() < 0:
        raise ValueError(f"capacity must not be negative, but the least is {places.min()}")
    if places.sum() < len(cost):
        raise ValueError(f"{len(cost)} points do not fit into {places.sum()} places")
    return cost, places


def _normalised(cost: np.ndarray) -> tuple[np.ndarray, int]:
    """Return costs above each point's least one, scaled into 0..1 by a power of two, and its exponent."""
    # Scaled before the subtraction so that it cannot overflow, and after it so that float32 can hold it.
    first = int(np.frexp(np.abs(cost).max())[1])
    work = np.ldexp(cost, -first)
    work -= work.min(1, keepdims=True)
    second = int(np.frexp(work.max())[1])
    np.ldexp(work, -second, out=work)
    return work, first + second


def _in_range(prices: np.ndarray) -> np.ndarray:
    """Return prices >= 0 for costs of 0..1, cut at 2: larger ones would cost precision when added to the costs."""
    return np.asarray(np.minimum(prices - prices.min(), 2.0))


def _surplus(work: np.ndarray, places: np.ndarray, prices: np.ndarray) -> int:
    """Return how many points find no place if each goes where ``cost + price`` is least."""
    sizes = np.bincount((work + prices).argmin(1), minlength=len(places))
    return int((sizes - places).clip(0).sum())


def _first_prices(work: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return no prices, or those that make clusters equally expensive on average, whichever fits better."""
    level = _in_range(-work.mean(0))
    none = np.zeros(len(places))
    return level if _surplus(work, places, level) < _surplus(work, places, none) else none


def _guess_prices(
    work: np.ndarray, places: np.ndarray, start: np.ndarray, temperatures: tuple[float, ...]
) -> np.ndarray:
    """Return prices at which the clusters attract about as many points as they have places.

    Newton's method with line search on the smoothed dual ``sum_t softmin_eps(cost_t + price) - places.price``
    (concave), at falling temperatures. In float32: it is a guess.
    """
    costs = work + start
    costs -= costs.min(1, keepdims=True)
    unit = float(costs.mean())
    weight = np.ones(len(work), np.float32)
    free = int(places.sum()) - len(work)
    if free:  # the free places are filled by points whose cost is the same everywhere
        costs = np.vstack([costs, start - start.min()])
        weight = np.append(weight, np.float32(free))
    costs = costs.astype(np.float32)
    change = np.zeros(len(places))
    # One thread: the products are so short that several threads mostly wait for one another (up to tenfold times
    # if other programs use the cores), and the result does not depend on the number of threads.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for temperature in temperatures:
            if unit * temperature > np.finfo(np.float32).tiny:
                change = _newton(costs, weight, places, change, unit * temperature)
    return _in_range(start + change)


def _newton(costs: np.ndarray, weight: np.ndarray, places: np.ndarray, prices: np.ndarray, eps: float) -> np.ndarray:
    """Take a few damped Newton steps upwards on the dual smoothed by ``eps``."""
    mean = places.mean()
    value, shares = _smoothed_dual(costs, weight, places, prices, eps)
    for _ in range(_NEWTON_STEPS):
        weighted = shares * weight[:, None]
        gradient = weighted.sum(0, dtype=np.float64) - places
        if np.abs(gradient).sum() / 2 < _CLOSE_ENOUGH * places.sum():
            break
        curvature = -(weighted.T @ shares).astype(np.float64)
        # The constant fixes the direction that changes nothing (all prices alike); the last term damps the steps
        # of clusters that have no point near a boundary.
        curvature += mean / len(places)
        curvature[np.diag_indices_from(curvature)] += gradient + places + 0.01 * mean
        step = eps * np.linalg.solve(curvature, gradient)
        for length in (1.0, 0.25, 0.06, 0.015, 0.004):
            trial, trial_shares = _smoothed_dual(costs, weight, places, prices + length * step, eps)
            if trial >= value + 1e-4 * length * float(gradient @ step):
                break
        else:
            break
        prices, value, shares = prices + length * step, trial, trial_shares
    return prices


def _smoothed_dual(
    costs: np.ndarray, weight: np.ndarray, places: np.ndarray, prices: np.ndarray, eps: float
) -> tuple[float, np.ndarray]:
    """Return the smoothed dual and the share ``[T, K]`` of each point that each cluster attracts."""
    shares = costs + prices.astype(np.float32)
    shares *= np.float32(-1 / eps)
    top = shares.max(1, keepdims=True)
    shares -= top
    np.exp(shares, out=shares)
    total = shares.sum(1, keepdims=True)
    shares /= total
    softmin = -eps * (top + np.log(total))[:, 0].astype(np.float64)
    return float((weight * softmin).sum() - (places * prices).sum()), shares


class _Chains:
    """An assignment that is optimal for its own sizes, moved to the required sizes along shortest chains.

    Attributes:
        labels: int64 ``[T]``.
        prices: float64 ``[K]``; ``moves[a, b] + prices[b] - prices[a] >= 0`` for all a, b.
        idle: int64 ``[K]``, number of places in each cluster that stay free. They act like points
            whose every move costs nothing.
        excess: int64 ``[K]``, points plus idle places minus places.
        moves: float64 ``[K, K]``, the least cost of moving a point (or an idle place) of a to b.
    """

    def __init__(self, cost: np.ndarray, places: np.ndarray, prices: np.ndarray) -> None:
        num_clusters = len(places)
        self.cost = cost
        self.prices = prices.astype(np.float64)
        self.labels = (cost + prices).argmin(1)
        self.excess = np.bincount(self.labels, minlength=num_clusters) - places
        self.idle = self._place_idle(int(places.sum()) - len(cost))
        self.excess += self.idle
        self.moves = np.empty((num_clusters, num_clusters))
        for cluster in range(num_clusters):
            self._refresh(cluster)

    def _place_idle(self, count: int) -> np.ndarray:
        """Spread the idle places over the cheapest clusters: into their free places, the rest into the first."""
        cheapest = self.prices == self.prices.min()
        filled = np.minimum(np.cumsum(np.where(cheapest, -self.excess, 0).clip(0)), count)
        idle = np.diff(filled, prepend=0)
        idle[cheapest.argmax()] += count - filled[-1]
        return np.asarray(idle)

    def _refresh(self, cluster: int) -> None:
        """Recompute row ``cluster`` of `moves`."""
        members = self.cost[self.labels == cluster]
        own = members[:, cluster : cluster + 1].copy()
        members -= own
        self.moves[cluster] = members.min(0, initial=0.0 if self.idle[cluster] else np.inf)

    def run(self) -> None:
        """Pass points on until no cluster is too full."""
        while (self.excess > 0).any():
            chain = self._shortest_chain()
            self._send(chain)
            for cluster in chain:
                self._refresh(cluster)

    def _shortest_chain(self) -> list[int]:
        """Return the clusters from an overfull one to the nearest with a free place (Dijkstra on reduced costs)."""
        distance = np.where(self.excess > 0, 0.0, np.inf)
        open_distance = distance.copy()
        parent = np.full(len(distance), -1)
        while True:
            here = int(open_distance.argmin())
            reached = open_distance[here]
            if self.excess[here] < 0:
                break
            open_distance[here] = np.inf
            through = self.moves[here] + (self.prices - self.prices[here])
            np.maximum(through, 0.0, out=through)  # rounding may leave a tiny negative reduced cost
            through += reached
            better = through < distance
            parent[better] = here
            np.copyto(distance, through, where=better)
            np.copyto(open_distance, through, where=better)
        self.prices -= np.minimum(distance, reached)
        chain = [here]
        while parent[chain[-1]] >= 0:
            chain.append(int(parent[chain[-1]]))
        return chain[::-1]

    def _send(self, chain: list[int]) -> None:
        """Send as many units along the chain as possible at its price (several if costs are equal)."""
        movers = [self._movers(a, b) for a, b in pairwise(chain)]
        room = min(int(self.excess[chain[0]]), int(-self.excess[chain[-1]]))
        amount = min(room, *(idle if points is None else len(points) for idle, points in movers))
        for (a, b), (_, points) in zip(pairwise(chain), movers, strict=True):
            if points is None:
                self.idle[a] -= amount
                self.idle[b] += amount
            else:
                self.labels[points[:amount]] = b
        self.excess[chain[0]] -= amount
        self.excess[chain[-1]] += amount

    def _movers(self, a: int, b: int) -> tuple[int, np.ndarray | None]:
        """Return the cheapest moves from a to b: idle places (their number, None) or points (0, indices)."""
        if self.idle[a] and self.moves[a, b] == 0:
            return int(self.idle[a]), None
        members = np.flatnonzero(self.labels == a)
        return 0, members[self.cost[members, b] - self.cost[members, a] == self.moves[a, b]]
