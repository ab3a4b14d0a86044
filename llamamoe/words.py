"""Counts and sizes in messages, as people read them."""

from __future__ import annotations


def plural(count: int, noun: str, ending: str = "s") -> str:
    """Return a count and its noun: ``1 layer``, ``1,024 layers``."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def amount(value: float) -> str:
    """A count with three digits and a letter: ``842``, ``12.9 B``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{_three(value / size)} {letter}"
    return f"{value:,.0f}"


def size(nbytes: float) -> str:
    """Bytes in decimal units: ``13.5 GB``."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= 0.9995 * unit:
            return f"{_three(nbytes / unit)} {name}"
    return f"{nbytes:,.0f} B"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
