"""Choose sizes for quality, speed or a balance of both, from measured speeds, fitted to the model's FFN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from .expected_speed import MeasuredShape, measured_shapes
from .sizes import QUANTISED_BLOCK

Preference = Literal["quality", "balanced", "speed"]

_Shapes = dict[tuple[int, int, float], list[MeasuredShape]]

SLOWER = 0.9
"""``balanced``: share of the fastest shape's mean rate that a shape must reach."""
SAME = 0.97
"""``speed``: rates count as equal if the smaller is at least this share of the larger, since readings vary by more."""
_TASKS = ("decode 1", "prefill")
_HALF = (0.4, 0.55)
"""Range of active shares: about half of the FFN, which gains most of the speed for little quality."""
_BEST_SHARED = 0.25
"""Share of shared neurons at which conversions lost least, of an eighth, a quarter and three eighths."""
_REACH = 1 / 16
_FAR = math.log(1.6)
_EVEN = 4
_UNEVEN = 0.1
"""Distance that is added for a number of experts that is not a multiple of 4: it divides badly among GPUs."""
LEAST_WIDTH = 16
"""Minimum width, up to which the number of experts is halved: padding and router of narrower ones cost too much."""


def candidates() -> _Shapes:
    """Return the measured shapes by N, k and shared share: about half of the FFN active, widths multiples of 32."""
    found: _Shapes = {}
    for each in measured_shapes():
        wide = each.num_experts and each.expert_width % QUANTISED_BLOCK == 0
        if wide and _HALF[0] <= each.active <= _HALF[1]:
            found.setdefault((each.num_experts, each.top_k, each.shared), []).append(each)
    return found


def _everywhere(shapes: _Shapes) -> _Shapes:
    """Return the shapes that all programs ran, so that none benefits from a missing measurement."""
    programs = {row.program for rows in shapes.values() for row in rows}
    return {key: rows for key, rows in shapes.items() if {row.program for row in rows} == programs} or shapes


def preferred_shape(prefer: Preference) -> tuple[int, int, float]:
    """Return N, k and shared share that the measurements recommend.

    More and narrower experts lose less quality (BENCHMARKS.md, "Conversion quality"), and least with about a quarter of
    the neurons shared ("Share of the neurons that is shared"): these are the shapes of ``quality``. ``balanced`` takes
    the most experts that are at most a tenth slower than the fastest shape: by the geometric mean, over all programs
    that were measured, of decoding one sequence and reading a prompt, each relative to the parent, the slowest of its
    rounds. ``speed`` takes the fastest, and of those that are as fast the one with the widest experts.
    """
    if prefer == "quality":
        return min(candidates(), key=lambda key: (abs(key[2] - _BEST_SHARED), -key[0]))
    speeds = {key: _speed(rows) for key, rows in _everywhere(candidates()).items()}
    best = max(speeds.values())
    if prefer == "speed":
        return min((key for key in speeds if speeds[key] >= SAME * best), key=lambda key: (key[0], -speeds[key]))
    return max((key for key in speeds if speeds[key] >= SLOWER * best), key=lambda key: (key[0], speeds[key]))


def _speed(rows: list[MeasuredShape]) -> float:
    rates = [row.ratios[task][1] for row in rows for task in _TASKS]
    return math.prod(rates) ** (1 / len(rates))


def preferred_sizes(prefer: Preference, size: int) -> dict[str, Any]:
    """Return keys of a split's recipe for an FFN of ``size`` neurons: N, k, S and the multiple of widths.

    Experts are a multiple of 32 neurons wide, without padding if N and S near the preferred ones allow it; then k is the
    number with which a token uses the same share of the FFN.
    """
    experts, top_k, shared = preferred_shape(prefer)
    best = min(_exact(size, experts, shared), default=None)
    if best is not None:
        _, count, kept = best
        routed = 1 - kept / size
        active = shared + (1 - shared) * top_k / experts
        return _keys(count, (active - kept / size) / routed, kept) | {"pad_to": QUANTISED_BLOCK}
    count = experts
    while count >= 4 and size * (1 - shared) / count < LEAST_WIDTH:
        count //= 2
    if count > _EVEN:
        count -= count % _EVEN
    return _keys(count, top_k / experts, shared)


def _keys(count: int, share: float, shared: float | int) -> dict[str, Any]:
    return {"num_experts": count, "top_k": max(1, math.floor(share * count + 0.5)), "shared": shared}


def _exact(size: int, experts: int, shared: float) -> Iterator[tuple[float, int, int]]:
    """Yield the distance from the preferred sizes, N and S for each FFN split into experts of 32 m neurons."""
    block = QUANTISED_BLOCK
    reach = int(_REACH * size) // block * block
    wish = round(shared * size / block) * block
    kept = [0] if not shared else range(max(block, wish - reach), wish + reach + 1, block)
    for count_shared in kept:
        routed = size - count_shared
        for width in range(block, routed // 2 + 1, block):
            if routed % width == 0:
                away = abs(math.log(routed // width / experts))
                if away <= _FAR:
                    uneven = _UNEVEN if routed // width % _EVEN else 0.0
                    yield away + 2 * abs(count_shared / size - shared) + uneven, routed // width, count_shared
