"""Draw bars: perplexity by domain, losses against the parent, and parameters by part."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Sized
from typing import Any

from ..lazy import matplotlib
from .figures import MARKERS, Chart, Key, colour, draw
from .page_values import Series, error_of, get, known, number, percent, ratio, with_error
from .page_words import ffn_share, parent_of

_LABEL = 20  # characters of a name beside the axis; the table has it whole
_BAR = 11.0  # CSS pixels of a bar
_GAP = 12.0
_AXIS = 46.0
_LOG_FROM = 12.0  # largest over median value from which bars would hide small values
PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "routed_attention": "attention experts",
    "router": "router",
    "routed": "routed experts",
    "shared": "shared expert",
    "stub": "padding and stubs",
    "dense_ffn": "dense FFN",
    "norm": "norms",
    "head": "output head",
}
"""Names of the parts of the cost on the page."""
MEASURES = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
"""Names of the measures of quality on the page."""
_SHARES = {
    "parameters used": "active_parameters",
    "FLOPs a token": "flops_per_token",
    "parameters stored": "total_parameters",
    "bytes of weights": "bytes",
}


def short(name: str) -> str:
    """Shorten a name to fit beside an axis."""
    return name if len(name) <= _LABEL else name[: _LABEL - 1] + "…"


def quality(series: Sequence[Series], domains: Sequence[str], measure: str) -> Chart | None:
    """Draw grouped bars with standard errors: a group per domain, and the mean over domains."""
    rows: list[tuple[str, tuple[str, ...]]] = [(domain, ("domains", domain)) for domain in domains]
    rows += [("mean", ("mean_over_domains",))] if len(domains) > 1 else []
    values = [[_score(one, path, measure) for _, path in rows] for one in series]
    found = known(value for line in values for value, _ in line)
    if not found:
        return None
    logarithmic = max(found) > _LOG_FROM * statistics.median(found)

    def paint(axes: matplotlib.axes.Axes) -> None:
        thick = 0.8 / len(series)
        for i, (one, line) in enumerate(zip(series, values, strict=True)):
            at = [row - 0.4 + (i + 0.5) * thick for row in range(len(rows))]
            axes.barh(at, [v or 0.0 for v, _ in line], thick * 0.9, color=colour(one.colour), linewidth=0)
            for y, (value, error) in zip(at, line, strict=True):
                if value is not None and error:
                    axes.errorbar(value, y, xerr=error, color=colour("ink"), elinewidth=1.2, capsize=2.0)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(min(found) / 2, max(found) * 1.3)
        _rows(axes, [name for name, _ in rows])
        axes.set_xlabel(MEASURES[measure] + (" (log scale)" if logarithmic else ""))

    keys = [Key(one.name, f"s{one.colour}", "box") for one in series]
    means = "; ".join(f"{s.name} {number(line[-1][0])}" for s, line in zip(series, values, strict=True))
    title = f"{MEASURES[measure].capitalize()} by domain"
    told = f"{title}, {rows[-1][0]}: {means}. All values are in the table."
    return Chart(title, draw(_height(rows, series), paint), told, "Less is better; whiskers: one standard error.", keys)


def _score(one: Series, path: tuple[str, ...], measure: str) -> tuple[float | None, float | None]:
    """Return value and standard error; perplexity's follows from the loss's."""
    score = get(one.model, "scores", *path)
    value = get(score, measure)
    error = error_of(score, "bits_per_byte" if measure == "bits_per_byte" else "loss")
    return value, (error * value if measure == "perplexity" and error and value else error)


def difference(series: Sequence[Series], domains: Sequence[str], measure: str) -> Chart | None:
    """Draw points with intervals: each model's additional loss over the parent's on the same documents."""
    what = "loss" if measure == "perplexity" else "bits_per_byte"
    rows: list[tuple[str, tuple[str, ...]]] = [(domain, ("domains", domain)) for domain in domains]
    rows += [("mean", ("mean_over_domains",))] if len(domains) > 1 else []
    models = [one for one in series if one.place and get(one.model, "difference")]
    nodes = {one.place: [get(one.model, "difference", *path) for _, path in rows] for one in models}
    if not any(get(node, what) is not None for line in nodes.values() for node in line):
        return None
    unit = "nats a token" if what == "loss" else "bits a byte"

    def paint(axes: matplotlib.axes.Axes) -> None:
        axes.axvline(0, color=colour(0), linewidth=1.5)
        for i, one in enumerate(models):
            for row, node in enumerate(nodes[one.place]):
                if (value := get(node, what)) is not None:
                    interval = get(node, f"{what}_interval")
                    at = row - 0.4 + (i + 0.5) * 0.8 / len(models)
                    _point(axes, value, interval[1] - value if interval else 0.0, at, one.colour)
        axes.set_xlim(*_with_zero(axes.get_xlim()))
        _rows(axes, [name for name, _ in rows])
        axes.set_xlabel(f"more loss than the parent, {unit}")

    told = [f"{m.name} {with_error(get(n[-1], what), error_of(n[-1], what))}" for m, n in zip(models, nodes.values(), strict=True)]  # fmt: skip
    keys = [Key(one.name, f"s{one.colour}", "shape") for one in models]
    return Chart(
        "Loss against the parent, document by document",
        draw(_height(rows, series), paint),
        f"Difference to the parent in {unit}, {rows[-1][0]}: {'; '.join(told)}. All values are in the table.",
        "Paired: both models read the same documents. Lines: 95 % intervals; the upright line is the parent.",
        keys,
    )


def _point(axes: matplotlib.axes.Axes, value: float, error: float, at: float, place: int) -> None:
    marker = MARKERS[place]
    axes.errorbar(value, at, xerr=error, color=colour(place), elinewidth=2.0, marker=marker, markersize=6.0, capsize=0)


def _with_zero(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    room = 0.04 * (high - low)
    return low - room, high + room


def parts_of(series: Sequence[Series]) -> list[str]:
    """Return the parts that any of the models has."""
    return [part for part in PARTS if any(get(one.model, "cost", "parts", part, "total") for one in series)]


def cost(series: Sequence[Series]) -> Chart | None:
    """Draw bars by part: all parameters pale, those used by a token solid."""
    parts = parts_of(series)
    if not parts:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        thick = 0.8 / len(series)
        for i, one in enumerate(series):
            at = [row - 0.4 + (i + 0.5) * thick for row in range(len(parts))]
            for kind, alpha in (("total", 0.35), ("active", 1.0)):
                widths = [(get(one.model, "cost", "parts", part, kind) or 0) / 1e6 for part in parts]
                axes.barh(at, widths, thick * 0.9, color=colour(one.colour), alpha=alpha, linewidth=0)
        _rows(axes, [PARTS[part] for part in parts])
        axes.set_xlabel("million parameters")

    keys = [Key(one.name, f"s{one.colour}", "box") for one in series]
    keys += [Key("used by a token", "ink", "box"), Key("stored", "ink", "pale")]
    told = "; ".join(f"{one.name}: {_active(one.model)} of its parameters are used by a token" for one in series)
    return Chart("Parameters by part", draw(_height(parts, series), paint), told + ".", "", keys)


def shares(series: Sequence[Series]) -> Chart | None:
    """Draw bars of what each model stores and uses, as a share of the parent; None without a parent."""
    parent = parent_of(series)
    models = [one for one in series if one.place]
    values = {"FFN used": [ffn_share(one.model, parent) for one in models]}
    for name, key in _SHARES.items():
        values[name] = [ratio(get(one.model, "cost", key), get(parent, "cost", key)) for one in models]
    found = known(value for row in values.values() for value in row)
    if parent is None or not found:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        thick = 0.8 / len(models)
        for i, one in enumerate(models):
            for row, line in enumerate(values.values()):
                at, wide = row - 0.4 + (i + 0.5) * thick, 100 * (line[i] or 0.0)
                axes.barh(at, wide, thick * 0.9, color=colour(one.colour), linewidth=0)
                axes.annotate(percent(line[i]), (wide + 1.5, at), va="center", color=colour("ink"), fontsize=11)
        axes.axvline(100, color=colour(0), linewidth=1.5, zorder=0.5)
        axes.set_xlim(0, 118 * max(1.0, *found))
        _rows(axes, list(values))
        axes.set_xlabel("per cent of the parent’s")

    told = "; ".join(f"{m.name} {n} {percent(row[i])}" for n, row in values.items() for i, m in enumerate(models))
    return Chart(
        "Against the parent",
        draw(_height(values, models), paint),
        f"Shares of the parent’s: {told}.",
        "The upright line is the parent. Used: by one token.",
        [Key(one.name, f"s{one.colour}", "box") for one in models],
    )


def _active(model: Mapping[str, Any]) -> str:
    active, total = get(model, "cost", "active_parameters"), get(model, "cost", "total_parameters")
    return percent(active / total if active is not None and total else None)


def _rows(axes: matplotlib.axes.Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color=colour("rule"), linewidth=0.8)
    axes.spines["left"].set_visible(False)


def _height(rows: Sized, series: Sequence[Series]) -> float:
    return _AXIS + len(rows) * (_BAR * (len(series) + (len(series) == 1) * 0.6) + _GAP)
