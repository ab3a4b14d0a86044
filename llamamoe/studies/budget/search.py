"""Choose the layers that stay dense under one budget, and distribute neurons over layers: pure arithmetic.

Shares are active multiply-adds of an FFN over the dense FFN's. Damages of layers are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import RefusedError
from ...lazy import np
from ..sizes import Sizes
from .sensitivities.curves import Curves

DenseForm = Literal["none", "leading", "ends", "any"]
"""The layers that can stay dense in a target (see `Target.dense_layers`)."""


@dataclass(frozen=True)
class DenseSet:
    """Layers that stay dense, and the sizes of the others.

    Attributes:
        layers: The layers, ascending.
        sizes: Sizes of every other layer; their ``share`` is the cost of one layer.
        damage: Sum over the other layers.
        share: Mean active share over all layers.
    """

    layers: tuple[int, ...]
    sizes: Sizes
    damage: float
    share: float


def rest_of_budget(budget: float, num_layers: int, dense: int) -> float:
    """Return the share that each of the other layers may cost if ``dense`` layers cost their whole FFN."""
    return (num_layers * budget - dense) / (num_layers - dense)


def dense_sets(curves: Curves, budget: float, form: DenseForm, fit: Callable[[float], Sizes]) -> list[DenseSet]:
    """Return the set with the least damage for every number of dense layers within the budget, exactly.

    The number alone decides the other layers' sizes, these each layer's damage, and then the layers that lose most
    stay dense. The minimum over numbers is the optimum. O(L^2), and L calls of ``fit``.

    Args:
        curves: The damage of each layer by its share.
        budget: Maximum mean share over all layers.
        form: The sets that the target supports.
        fit: Returns the best sizes that cost at most a share.

    Returns:
        At least the empty set, in the order of their number.

    Raises:
        RefusedError: No sizes fit even without dense layers.
    """
    count = curves.num_layers
    found: list[DenseSet] = []
    for dense in range(count if form != "none" else 1):
        rest = rest_of_budget(budget, count, dense)
        if rest <= 0:
            break
        try:
            sizes = fit(rest)
        except RefusedError:
            if dense == 0:
                raise
            continue
        damage_L = curves.at(sizes.share)
        layers = dense_layers(damage_L, dense, form)
        damage = math.fsum(float(d) for i, d in enumerate(damage_L) if i not in layers)
        found.append(DenseSet(layers, sizes, damage, (dense + (count - dense) * sizes.share) / count))
    return found


def least_damage(sets: Sequence[DenseSet]) -> DenseSet:
    """Return the set with the least damage; the first of equal ones."""
    return min(sets, key=lambda each: each.damage)


def dense_layers(damage_L: np.ndarray, count: int, form: DenseForm) -> tuple[int, ...]:
    """Return the ``count`` permitted layers with the largest total damage, ascending; the first of equal ones."""
    layers = len(damage_L)
    if form == "any":
        order = np.argsort(-damage_L, kind="stable")
        return tuple(sorted(int(i) for i in order[:count]))
    leads = range(count, -1, -1) if form == "ends" else [count]
    sets = [(*range(lead), *range(layers - count + lead, layers)) for lead in leads]
    return max(sets, key=lambda each: math.fsum(damage_L[list(each)]))


def cheapest_choices(costs_C: Sequence[int], damage_CL: np.ndarray, capacity: int) -> list[int] | None:
    """Return one of C choices for every layer, with the least total damage at a cost of at most ``capacity``.

    The knapsack problem with one choice per layer, exactly, by dynamic programming. O(L C capacity).

    Args:
        costs_C: What each choice costs, the same in every layer, not negative.
        damage_CL: float64 ``[C, L]``.
        capacity: Maximum cost of all layers together.

    Returns:
        The choice of each layer; None if even the cheapest are too expensive. The first of equal ones.
    """
    choices, layers = damage_CL.shape
    if capacity < min(costs_C) * layers:
        return None
    best = np.zeros(capacity + 1)  # by cost that may be spent so far
    taken = np.zeros((layers, capacity + 1), dtype=np.int16)
    for layer in range(layers):
        after = np.full(capacity + 1, np.inf)
        for choice in range(choices):
            cost = costs_C[choice]
            if cost > capacity:
                continue
            value = np.full(capacity + 1, np.inf)
            value[cost:] = best[: capacity + 1 - cost] + damage_CL[choice, layer]
            better = value < after
            after[better] = value[better]
            taken[layer, better] = choice
        best = after
    found, left = [], capacity
    for layer in reversed(range(layers)):
        found.append(int(taken[layer, left]))
        left -= costs_C[found[-1]]
    return found[::-1]


def share_out_top_k(curves: Curves, shares_N: Sequence[float], top_k: int) -> tuple[tuple[int, ...], float]:
    """Return a number of selected experts for every layer, at most ``top_k`` on average, with the least damage.

    Experts are equally wide in all layers, so that the sum over layers is what a token computes. One k for all layers
    is among the choices.

    Args:
        curves: The damage of each layer by its share.
        shares_N: A layer's active share with 1, 2, ... N experts selected, ascending.
        top_k: The mean of k over the layers that may not be exceeded.

    Returns:
        k of every layer, and the sum of damages.
    """
    costs = range(1, len(shares_N) + 1)
    damage_NL = np.stack([curves.at(share) for share in shares_N])
    found = cheapest_choices(costs, damage_NL, top_k * curves.num_layers)
    assert found is not None, "one expert in each layer costs at most top_k"
    damage = math.fsum(float(damage_NL[choice, layer]) for layer, choice in enumerate(found))
    return tuple(costs[choice] for choice in found), damage


def share_out(
    curves: Curves, budget: float, size: int, fixed: float, unit: int, routed: int
) -> tuple[tuple[int, ...], float] | None:
    """Return shared neurons by layer, for one size of experts and router, with the least damage on a grid.

    Args:
        curves: The damage of each layer by its share.
        budget: Maximum mean share over all layers.
        size: F.
        fixed: Cost of a layer beside its shared neurons, in neurons: selected experts, router, gate.
        unit: Step of the grid, in neurons.
        routed: Minimum number of routed neurons.

    Returns:
        S of every layer (F: it stays dense) and the sum of damages; None if nothing fits.
    """
    shared = list(range(0, size - routed + 1, unit))
    costs = [*range(len(shared)), max(0, math.ceil((size - fixed) / unit))]
    rows = [curves.at((s + fixed) / size) for s in shared]
    capacity = math.floor(curves.num_layers * (budget * size - fixed) / unit + 1e-9)
    damage_CL = np.stack([*rows, np.zeros(curves.num_layers)])
    found = cheapest_choices(costs, damage_CL, capacity)
    if found is None:
        return None
    damage = math.fsum(float(damage_CL[choice, layer]) for layer, choice in enumerate(found))
    return tuple([*shared, size][choice] for choice in found), damage
