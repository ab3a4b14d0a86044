"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamamoe.words import amount as amount
from llamamoe.words import plural as plural
from llamamoe.words import size as size


def routed_factor(factor: float, where: str) -> str:
    """The factor of routed outputs that a command applied, and its place: ``nowhere``, ``config`` or ``weights``."""
    places = {"nowhere": "no change needed", "config": "in routed_scaling_factor", "weights": "in the experts"}
    return f"{factor:.6g}, {places[where]}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def took(run: Mapping[str, Any]) -> str:
    """The duration of a run, and that of the interrupted ones that it finished: ``41 s, after 3 min 20 s in runs that were interrupted``."""
    before = run.get("seconds_before")
    earlier = f", after {duration(before)} in runs that were interrupted" if before else ""
    return duration(run["seconds"]) + earlier


def change(before: float, after: float) -> str:
    """``-56 %``, ``+1.2 %``, ``same``."""
    if before == after or not before:
        return "same" if before == after else "new"
    percent = 100 * (after / before - 1)
    return f"{percent:+.0f} %" if abs(percent) >= 9.95 else f"{percent:+.1f} %" if abs(percent) >= 0.05 else "+-0.0 %"


def error(value: float) -> str:
    """A relative difference: ``3.1e-07``, ``0``."""
    return "0" if value == 0 else f"{value:.1e}"
