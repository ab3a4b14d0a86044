"""Draw heat maps and bars over experts as small SVG paths: one path per colour, set by the style sheet.

page.js draws the same paths when another layer is selected; the browser test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LIMITS = (0.25, 0.5, 0.7, 0.9, 1.1, 1.5, 2.0, 4.0)
"""Boundaries of the nine colours of a heat map, as multiples of the usual value."""
DEAD = 0
"""The level of exactly zero; 1 to 9 are below, about and above the usual value."""
BAR_UNITS = 1000
"""Height of the drawing of bars."""


@dataclass(frozen=True)
class Step:
    """One entry of a heat map's legend."""

    level: int
    label: str


def level(ratio: float | None) -> int | None:
    """Return the colour of a multiple of the usual value; None if it was not measured."""
    if ratio is None:
        return None
    return DEAD if ratio <= 0 else 1 + sum(ratio >= limit for limit in LIMITS)


def legend(usual: str, nothing: str) -> list[Step]:
    """Return the meaning of the colours, in ascending order."""
    inner = [f"{a:g}–{b:g}" for a, b in pairwise(LIMITS)]
    labels = [nothing, f"< {LIMITS[0]:g}", *inner, f"≥ {LIMITS[-1]:g}"]
    labels[5] = f"{usual} ({inner[3]})"
    return [Step(i, label) for i, label in enumerate(labels)]


def heat_paths(rows: Sequence[Sequence[float | None]]) -> dict[int, str]:
    """Return path data by level, in units of a cell; neighbours of one colour are one rectangle."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        levels = [level(ratio) for ratio in row]
        x = 0
        while x < len(levels):
            end = x + 1
            while end < len(levels) and levels[end] == levels[x]:
                end += 1
            if (here := levels[x]) is not None:
                paths.setdefault(here, []).append(f"M{x} {y}h{end - x}v1h-{end - x}z")
            x = end
    return {key: "".join(paths[key]) for key in sorted(paths)}


def bar_path(values: Sequence[float], top: float) -> str:
    """Return bars from left to right, ten units wide each, with ``top`` as high as the drawing."""
    heights = [int(BAR_UNITS * value / top + 0.5) for value in values]
    return "".join(f"M{10 * i + 1} {BAR_UNITS}v-{height}h8v{height}z" for i, height in enumerate(heights))


def tick_path(values: Sequence[float | None], top: float) -> str:
    """Return a short line over each bar at the height of another value, if there is one."""
    heights = [None if value is None else int(BAR_UNITS * value / top + 0.5) for value in values]
    return "".join(f"M{10 * i + 1} {BAR_UNITS - high}h8" for i, high in enumerate(heights) if high is not None)


def ticks(numbers: Sequence[int], most: int) -> list[int]:
    """Return the positions to label: all if there are few, otherwise multiples of 2, 5, 10 and so on."""
    for step in (1, 2, 5, 10, 20, 25, 50):
        found = [place for place, number in enumerate(numbers) if number % step == 0]
        if len(found) <= most:
            return found
    return [0]
