"""Which layers stay dense under one budget, and how neurons would be shared out layer by layer: pure arithmetic.

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
"""Which layers a target lets stay dense (see `Target.dense_layers`)."""


@dataclass(frozen=True)
class DenseSet:
    """Layers that stay dense, and what the others get.

    Attributes:
        layers: Ascending.
        sizes: Of every other layer; its ``share`` is what one of them costs.
        damage: Sum over the other layers.
        share: Mean active share over all layers.
    """

    layers: tuple[int, ...]
    sizes: Sizes
    damage: float
    share: float


def rest_of_budget(budget: float, num_layers: int, dense: int) -> float:
    """The share that each of the other layers may cost when ``dense`` of them cost all of theirs."""
    return (num_layers * budget - dense) / (num_layers - dense)


def dense_sets(curves: Curves, budget: float, form: DenseForm, fit: Callable[[float], Sizes]) -> list[DenseSet]:
    """For every number of dense layers that the budget allows, the set of least damage, exactly.

    The number alone decides the other layers' sizes, these each layer's damage, and then the layers that lose most
    stay dense. The least of all is the best set there is. O(L^2), and L calls of ``fit``.

    Args:
        curves: The damage of each layer by its share.
        budget: Most mean share over all layers.
        form: Which sets the target can hold.
        fit: The best sizes that cost at most a share.

    Returns:
        At least the empty set, in the order of their number.

    Raises:
        RefusedError: Not even with no dense layer do any sizes fit.
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
    """The set of least damage; of equal ones the first."""
    return min(sets, key=lambda each: each.damage)


def dense_layers(damage_L: np.ndarray, count: int, form: DenseForm) -> tuple[int, ...]:
    """The ``count`` layers of largest damage together that the form allows, ascending; of equal ones the first."""
    layers = len(damage_L)
    if form == "any":
        order = np.argsort(-damage_L, kind="stable")
        return tuple(sorted(int(i) for i in order[:count]))
    leads = range(count, -1, -1) if form == "ends" else [count]
    sets = [(*range(lead), *range(layers - count + lead, layers)) for lead in leads]
    return max(sets, key=lambda each: math.fsum(damage_L[list(each)]))


def cheapest_choices(costs_C: Sequence[int], damage_CL: np.ndarray, capacity: int) -> list[int] | None:
    """For every layer one of C choices, of least damage together, that cost no more than ``capacity``.

    The knapsack problem with one choice a layer, exactly, by dynamic programming. O(L C capacity).

    Args:
        costs_C: What each choice costs, the same in every layer, not negative.
        damage_CL: float64 ``[C, L]``.
        capacity: Most cost of all layers together.

    Returns:
        The choice of each layer; None if even the cheapest are too expensive. Of equal ones the first choice.
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


def share_out(
    curves: Curves, budget: float, size: int, fixed: float, unit: int, routed: int
) -> tuple[tuple[int, ...], float] | None:
    """Shared neurons layer by layer, at one size of experts and router: of least damage on a grid.

    Args:
        curves: The damage of each layer by its share.
        budget: Most mean share over all layers.
        size: F.
        fixed: What a layer costs beside its shared neurons, in neurons: selected experts, router, gate.
        unit: Step of the grid, in neurons.
        routed: Fewest neurons that must be left to route.

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
