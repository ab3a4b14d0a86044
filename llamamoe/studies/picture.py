"""Draw the picture of a study: perplexity against the active share."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import replacing
from ..errors import LlamaMoeError
from ..lazy import matplotlib, require
from .recipe import BY_LAYER, ORACLE
from .table import Comparison, Row, number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe and Ito's colours, which are distinguishable for the colour-blind, each with its own marker."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREYS = (("#8A8A8A", "o"), ("#6E6E6E", "s"), ("#A5A5A5", "^"), ("#5A5A5A", "D"), ("#8A8A8A", "v"))
_SIMULATED: dict[str, tuple[Any, str]] = {
    ORACLE: ((0, (1, 2)), "an oracle router"),
    BY_LAYER: ((0, (4, 2)), "a k for each layer, dashed"),
}
"""Line style of each simulation and its name in the note, by the end of the row's name."""
_OFF_SCALE = 30.0  # times dense: larger values become an arrow at the edge, so that the rest is readable
_SIZE = (9.0, 5.4)
_LABEL = 9.0  # points
_LONGEST = 44  # characters of a name
NOTE = "#555555"
STYLE: Any = {"svg.hashsalt": "llamamoe", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
"""Settings of all pictures, which make them the same on every machine."""


@dataclass(frozen=True)
class _Series:
    """One line of the picture: points ``(share, perplexity, deviation)`` from left to right.

    ``simulated`` is the end of its name (see `_SIMULATED`), or empty.
    """

    name: str
    points: list[tuple[float, float, float]]
    colour: str
    marker: str
    simulated: str
    control: bool


def draw(found: Comparison, folder: Path) -> dict[str, str]:
    """Draw ``comparison.svg`` and ``comparison.png``; return their names by kind.

    Perplexity on a logarithmic axis against the share of the FFN's multiply-adds that a token uses; methods in colour,
    controls in grey, the dense model as a line, simulations hollow in their method's colour.

    Raises:
        MissingExtraError: matplotlib is not installed.
        LlamaMoeError: There is nothing to draw yet.
    """
    for module in ("matplotlib", "matplotlib.backends.backend_agg"):  # the package does not import the second
        require(module, "plot", "Drawing the picture")
    lines = _series(found.rows)
    if not lines:
        raise LlamaMoeError("there is nothing to draw: no conversion is measured yet.")
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=_SIZE, facecolor="white")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        named = [line for line in lines if not line.simulated] or lines
        axes = figure.add_axes((0.085, 0.125, 0.885 - _label_room(named), 0.745))
        dense = next((row.perplexity for row in found.rows if row.kind == "dense"), None)
        top = _frame(axes, lines, dense)
        for line in lines:
            _line(axes, line, top)
        _labels(axes, named, dense, top)
        _titles(figure, found, {line.simulated for line in lines})
        return save_figure(figure, folder, "comparison")


def save_figure(figure: matplotlib.figure.Figure, folder: Path, name: str) -> dict[str, str]:
    """Write ``NAME.svg`` and ``NAME.png``, the same bytes for the same figure; return their names by kind."""
    files = {}
    for kind in ("svg", "png"):
        files[kind] = f"{name}.{kind}"
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        with replacing(folder / files[kind]) as file:
            figure.savefig(file, format=kind, dpi=150, facecolor="white", metadata=metadata)
    return files


def _series(rows: Sequence[Row]) -> list[_Series]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind != "dense":
            groups.setdefault(row.method, []).append(row)
    methods = [name for name, group in groups.items() if group[0].kind == "method"]
    methods.sort(key=lambda name: min(row.perplexity for row in groups[name]))  # the best gets the strongest colour
    style = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(methods)}
    ends = {name: next((end for end in _SIMULATED if name.endswith(f", {end}")), "") for name in groups}
    controls = sorted(name for name, end in ends.items() if name not in style and not end)
    style |= {name: _GREYS[i % len(_GREYS)] for i, name in enumerate(controls)}
    out = []
    for name, group in groups.items():
        base = name.removesuffix(f", {ends[name]}")
        colour, marker = style.get(base, _GREYS[0])
        points = sorted((row.share, row.perplexity, row.perplexity_stdev or 0.0) for row in group)
        out.append(_Series(name, points, colour, marker, ends[name], group[0].kind == "control"))
    return out


def _frame(axes: matplotlib.axes.Axes, lines: Sequence[_Series], dense: float | None) -> float:
    """Set scales, ticks and grid; return the largest perplexity on the scale."""
    values = [value for line in lines for _, value, _ in line.points]
    low = min([*values, dense or values[0]])
    inside = [value for value in values if value <= low * _OFF_SCALE] or [low]
    margin = (max(inside) / low) ** 0.08 + 0.04
    top: float = max(inside) * margin * (1.15 if len(inside) < len(values) else 1.0)
    axes.set_yscale("log")
    axes.set_ylim(low / margin, top)
    shares = [share for line in lines for share, _, _ in line.points]
    pad = max(0.06 * (max(shares) - min(shares)), 0.02)
    axes.set_xlim(max(0.0, min(shares) - pad), max(shares) + pad)
    subs = (1, 2, 5) if top / low > 8 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9) if top / low > 1.7 else range(10, 100, 5)
    scaled = [s / 10 if s >= 10 else s for s in subs]
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=scaled, numticks=30))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: number(float(value))))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.xaxis.set_major_formatter(
        matplotlib.ticker.PercentFormatter(1.0, decimals=0 if max(shares) - min(shares) > 0.1 else 1)
    )
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", labelsize=9, color="#999999", labelcolor="#222222")
    axes.tick_params(axis="y", which="minor", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    if dense is not None:
        axes.axhline(dense, color="#222222", linewidth=1.2, linestyle=(0, (6, 3)), zorder=1.5)
    return top


def _line(axes: matplotlib.axes.Axes, line: _Series, top: float) -> None:
    inside = [point for point in line.points if point[1] <= top]
    style: dict[str, Any] = {"color": line.colour, "zorder": 2.5 if line.control else 3.5}
    if inside:
        shares, values, spreads = zip(*inside, strict=True)
        axes.errorbar(
            shares,
            values,
            yerr=spreads if any(spreads) else None,
            marker=line.marker,
            markersize=5.5 if line.simulated else 6.5,
            markerfacecolor="white" if line.simulated else line.colour,
            markeredgecolor=line.colour,
            markeredgewidth=1.2,
            linewidth=1.0 if line.simulated else 1.4 if line.control else 1.9,
            linestyle=_SIMULATED[line.simulated][0] if line.simulated else "-",
            capsize=3,
            elinewidth=1.1,
            **style,
        )
    for share, value, _ in line.points:
        if value > top and not line.simulated:
            axes.plot([share], [top / 1.02], marker="$\\uparrow$", markersize=9, clip_on=False, **style)


def _labels(axes: matplotlib.axes.Axes, lines: Sequence[_Series], dense: float | None, top: float) -> None:
    """Draw names at the right edge, moved apart to avoid overlaps, each tied to its last point."""
    one = max(len(line.points) for line in lines) == 1
    wanted: list[tuple[float, str, str, float]] = []  # height in points, text, colour, share of the point
    for line in lines:
        share, value, _ = line.points[-1]
        off = value > top
        name = line.name if len(line.name) <= _LONGEST else line.name[: _LONGEST - 1] + "…"
        shown = f"{name}  {number(value)}" if one or off else name
        shown += " ↑" if off else ""
        wanted.append((min(value, top / 1.02), shown, line.colour, share))
    if dense is not None:
        wanted.append((dense, f"dense  {number(dense)}", "#222222", axes.get_xlim()[1]))
    wanted.sort(key=lambda label: label[0])
    box = axes.get_window_extent()
    per_point = axes.figure.dpi / 72.0
    heights = [axes.transData.transform((0.5, label[0]))[1] / per_point for label in wanted]
    placed = _apart(heights, 1.35 * _LABEL, box.y0 / per_point, box.y1 / per_point)
    edge = axes.get_xlim()[1]
    for (value, text, colour, share), at in zip(wanted, placed, strict=True):
        height = axes.transData.inverted().transform((0.0, at * per_point))[1]
        axes.annotate(
            text,
            xy=(share, value),
            xytext=(edge + 0.045 * (edge - axes.get_xlim()[0]), height),
            fontsize=_LABEL,
            color=_darker(colour),
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 5,
            },
        )


def _label_room(lines: Sequence[_Series]) -> float:
    """Return the share of the figure's width that the names at the right edge take."""
    longest = max(len(line.name) for line in lines)
    points = 0.6 * _LABEL * (min(longest, _LONGEST) + 6) + 18
    return min(max(points / 72 / _SIZE[0], 0.15), 0.5)


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending heights as little as needed to be ``gap`` apart, within limits if they fit."""
    groups: list[list[float]] = []  # mean of preferred first heights, count
    for i, height in enumerate(heights):
        groups.append([height - i * gap, 1.0])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            mean, count = groups.pop()
            other, more = groups.pop()
            groups.append([(mean * count + other * more) / (count + more), count + more])
    firsts = [mean for mean, count in groups for _ in range(int(count))]
    room = max(high - (len(heights) - 1) * gap, low)
    return [min(max(first, low), room) + i * gap for i, first in enumerate(firsts)]


def _darker(colour: str) -> str:
    """Return the colour for text on white: mixed with black up to a WCAG contrast of 4.5."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    while _contrast(channels) < 4.5:
        channels = [0.93 * c for c in channels]
    return "#" + "".join(f"{round(255 * c):02x}" for c in channels)


def _contrast(channels: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def _titles(figure: Any, found: Comparison, simulated: Set[str]) -> None:
    axes = figure.axes[0]
    axes.set_xlabel("active multiply-adds of the FFN per token, router and padding included", fontsize=9.5)
    axes.set_ylabel("perplexity (log scale)", fontsize=9.5)
    seeds = max((len(row.seeds) for row in found.rows), default=0)
    domains = max((len(row.domains) for row in found.rows), default=0)
    notes = [
        f"mean over {domains} domains" if domains > 1 else "",
        f"{seeds} seeds, bars: deviation" if seeds > 1 else "",
    ]
    kinds = [name for end, (_, name) in _SIMULATED.items() if end in simulated]
    notes += ["grey: controls", f"hollow: the same with {' or '.join(kinds)} (simulated)" if kinds else ""]
    figure.text(0.085, 0.945, f"{found.source}: what conversions cost", fontsize=12.5, weight="bold", color="#111111")
    figure.text(0.085, 0.9, "; ".join(filter(None, notes)), fontsize=9, color=NOTE)
