"""Allocate neurons to experts by the importance of every neuron for every expert."""

from __future__ import annotations

import math

import numpy as np

from ..layer import PADDING, LayerContext, Partition


def assign_greedily(score_NF: np.ndarray, capacity: int) -> np.ndarray:
    """Repeatedly take the pair (expert, neuron) with the largest score among free neurons and experts with room.

    As long as no expert is full, every neuron goes to its best expert: neurons are taken in the order of that score up
    to the first whose expert is full, and the others choose again. At most N rounds of O(N F + F log F). Of equal
    scores the first neuron is taken, and its first expert.

    Args:
        score_NF: ``[N, F]``, finite.
        capacity: Neurons per expert; ``N capacity >= F``.

    Returns:
        int64 ``[F]``, the expert of each neuron.
    """
    num_experts, num_neurons = score_NF.shape
    if num_experts * capacity < num_neurons:
        raise ValueError(f"{num_neurons} neurons do not fit {num_experts} x {capacity}")
    labels = np.full(num_neurons, -1, np.int64)
    room = np.full(num_experts, capacity)
    free = np.arange(num_neurons)
    while len(free):
        with_room = np.flatnonzero(room)
        scores = score_NF[np.ix_(with_room, free)]
        best = scores.argmax(0)
        order = np.argsort(-scores[best, np.arange(len(free))], kind="stable")
        wanted = with_room[best[order]]
        refused = np.flatnonzero(_rank_among_equals(wanted) >= room[wanted])
        stop = refused[0] if len(refused) else len(order)
        labels[free[order[:stop]]] = wanted[:stop]
        room -= np.bincount(wanted[:stop], minlength=num_experts)
        free = np.sort(free[order[stop:]])
    return labels


def _rank_among_equals(values: np.ndarray) -> np.ndarray:
    """Return for each entry how many before it have the same value (whole numbers from 0)."""
    order = np.argsort(values, kind="stable")
    sizes = np.bincount(values)
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks


def best_of_each(score_NF: np.ndarray, neurons: np.ndarray, shared: np.ndarray, context: LayerContext) -> Partition:
    """Give every expert its W best neurons, whatever the others have; neurons in no expert are omitted."""
    experts = np.full((context.num_experts, context.expert_width), PADDING, np.int64)
    best = np.argsort(-score_NF, axis=1, kind="stable")[:, : context.expert_width]
    experts[:, : best.shape[1]] = np.sort(neurons[best], axis=1)
    return Partition(experts, np.sort(shared).astype(np.int64), np.setdiff1d(neurons, experts))


def most_wanted(score_NF: np.ndarray, width: int, count: int) -> np.ndarray:
    """Return int64 ``[count]``, ascending: the neurons in the preferred sets of most experts (`Gradient`, ``inter``).

    At most ``count`` rounds of O(N F).

    Args:
        score_NF: ``[N, F]``.
        width: Size of each expert's preferred set, at least 1.
        count: Number of neurons to find, at most F.
    """
    order_NF = np.argsort(-score_NF, axis=1, kind="stable")
    total_F = score_NF.sum(0)
    found = np.zeros(score_NF.shape[1], dtype=bool)
    while (missing := count - int(found.sum())) > 0:
        left_NF = ~found[order_NF]
        wanted = order_NF[left_NF & (left_NF.cumsum(1) <= max(width, 1))]
        votes = np.bincount(wanted, minlength=len(found))
        top = np.flatnonzero(votes == votes.max())
        found[top[np.argsort(-total_F[top], kind="stable")][:missing]] = True
    return np.flatnonzero(found).astype(np.int64)


def expected_copies(num_experts: int, top_k: int) -> np.ndarray:
    """Return float64 ``[N + 1]``: for a neuron in n experts, the mean copies among k random ones that have any."""
    none = [math.comb(num_experts - n, top_k) / math.comb(num_experts, top_k) for n in range(num_experts + 1)]
    return np.array([0.0] + [n * top_k / num_experts / (1 - none[n]) for n in range(1, num_experts + 1)])
