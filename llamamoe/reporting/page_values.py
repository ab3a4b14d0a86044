"""Format a report's values for a page: safe text, readable numbers, and a dash for missing values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

DASH = "–"
_SPACE = "\N{NO-BREAK SPACE}"
_PLAIN = {code: code + 0x2400 for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
LIMIT_SERIES = 4
"""Number of models beside the parent with distinct colours; further ones share them."""


@dataclass(frozen=True)
class Series:
    """One model in every figure and table: place 0 is the parent, and the place is its colour."""

    place: int
    name: str
    model: Mapping[str, Any]

    @property
    def colour(self) -> int:
        """Its colour among ``--s0`` to ``--s4``."""
        return 0 if self.place == 0 else (self.place - 1) % LIMIT_SERIES + 1


def clean(value: Any) -> Any:
    """Return a copy that HTML, JSON and SVG can hold.

    Numbers that are not finite become None. Control characters, which HTML cannot contain, become their pictures
    (U+2400 and on), and halves of surrogate pairs, which UTF-8 cannot encode, become U+FFFD.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_PLAIN)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def get(node: Any, *path: str | int) -> Any:
    """Return the value at a path, or None if any part of it is missing or null."""
    for key in path:
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, Sequence) and isinstance(key, int) and -len(node) <= key < len(node):
            node = node[key]
        else:
            return None
    return node


def error_of(node: Any, what: str) -> float | None:
    """Return the standard error of a value in an evaluation's JSON."""
    found: float | None = get(node, f"{what}_stderr")
    return found


def series_of(report: Mapping[str, Any]) -> list[Series]:
    """Return the parent, if there is one, and the models."""
    parent = [Series(0, str(get(report["parent"], "name")), report["parent"])] if report.get("parent") else []
    return parent + [Series(i, str(get(m, "name")), m) for i, m in enumerate(report["models"], start=1)]


def parts_of_routing(series: Sequence[Series]) -> list[Series]:
    """Return the models with one series for every kind of router: FFNs and, where it is routed, too, attention."""
    found, place = [], max(one.place for one in series)
    for one in series:
        attention = get(one.model, "routing", "attention")
        if attention is None:
            found.append(one)
            continue
        place += 1
        found += [
            replace(one, name=f"{one.name}, FFNs"),
            Series(place, f"{one.name}, attention", {**one.model, "routing": attention}),
        ]
    return found


def known(values: Iterable[float | None]) -> list[float]:
    """Return the values that are not None."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    found = known(values)
    return sum(found) / len(found) if found else None


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with significant digits, all those before the point, and separated thousands."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.1e}".replace("-", "−")
    return _typeset(f"{value:,.{max(digits - 1 - size, 0)}f}")


def signed(value: float | None, digits: int = 3) -> str:
    """Format a number with its sign, including a plus."""
    return ("+" if value is not None and value > 0 else "") + number(value, digits)


def with_error(value: float | None, error: float | None, digits: int = 3, sign: bool = False) -> str:
    """Format ``1.234 ± 0.012``: the error to two digits, the value to the same decimals."""
    if value is None:
        return DASH
    if not error or error < 0:
        return signed(value, digits) if sign else number(value, digits)
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    text = f"{value:+,.{decimals}f}" if sign else f"{value:,.{decimals}f}"
    return _typeset(f"{text}{_SPACE}±{_SPACE}{error:,.{decimals}f}")


def percent(share: float | None, digits: int = 3) -> str:
    """Format a share in per cent, to significant digits but at most hundredths of a per cent."""
    if share is None:
        return DASH
    hundred = 100 * share
    size = math.floor(math.log10(abs(hundred))) if hundred else 0
    return f"{hundred:.{min(max(digits - 1 - size, 0), 2)}f}{_SPACE}%".replace("-", "−")


def count(value: float | None) -> str:
    """Format a large number in short: ``134.5 M``."""
    return _scaled(value, _SCALES)


def size(value: float | None) -> str:
    """Format bytes in short, in powers of 1000: ``269 MB``."""
    return _scaled(value, _BYTES, "B")


def times(value: float | None) -> str:
    """Format a factor: ``× 1.51``."""
    return DASH if value is None else f"×{_SPACE}{number(value)}"


def whole(value: float | None) -> str:
    """Format a whole number with separated thousands."""
    return DASH if value is None else _typeset(f"{value:,.0f}")


def ratio(value: float | None, other: float | None) -> float | None:
    """Return the ratio of two numbers, None if it does not exist."""
    return None if value is None or not other else value / other


def exp(value: float | None) -> float | None:
    """Return the power of e; None beyond the range of floats."""
    return None if value is None or value > 700 else math.exp(value)


def _scaled(value: float | None, scales: Sequence[tuple[float, str]], unit: str = "") -> str:
    if value is None:
        return DASH
    for scale, name in scales:
        if abs(value) >= scale:
            return f"{number(value / scale, 4)}{_SPACE}{name}"
    return f"{whole(value)}{_SPACE}{unit}".rstrip(_SPACE)


def _typeset(text: str) -> str:
    """Separate thousands, and use the minus sign."""
    return text.replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "−")
