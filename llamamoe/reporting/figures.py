"""Draw the report's figures as SVG in the page's font and its light and dark colours.

matplotlib draws with stand-in colours, which become CSS variables. A figure is as wide as a phone, so that its text
can be read there; wider pages show two side by side.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..lazy import matplotlib, require
from .page_values import known, number

WIDTH = 400  # CSS pixels at full size
_NAMES = ("ink", "muted", "rule", "paper", "s0", "s1", "s2", "s3", "s4")
_STAND_INS = {name: f"#0a0b{16 + i:02x}" for i, name in enumerate(_NAMES)}
MARKERS = ("o", "s", "^", "D", "v")
_FONT = 12.0
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llamamoe",
    "text.parse_math": False,  # names may hold dollars
    "font.size": _FONT,
    "axes.labelsize": _FONT,
    "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1.0,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a model's colour, or a pattern that applies to every colour."""

    label: str
    colour: str  # a CSS variable without its dashes
    kind: str = "line"  # line, dash, faint, box, pale, dot, shape (the marker of that series)


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        title: A short title.
        svg: The drawing, safe to embed in HTML.
        alternative: The alternative text.
        note: How to read it; empty if it needs none.
        keys: The legend.
    """

    title: str
    svg: str
    alternative: str
    note: str = ""
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Line:
    """Values along the x axis.

    Attributes:
        label: Name in the alternative text.
        xs: Positions.
        ys: Values; None leaves a gap.
        colour: One of ``s0`` to ``s4``.
        dashed: Whether it is a reference (chance, noise) or the second of two quantities.
        faint: Whether it is drawn behind the others.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot of lines over the layers, or over the tokens of training.

    Attributes:
        low: Upper bound of the start of the y axis; None: the start of the values.
        high: Lower bound of its end.
    """

    title: str
    ylabel: str
    lines: Sequence[Line]
    xlabel: str = "layer"
    note: str = ""
    keys: Sequence[Key] = field(default_factory=tuple)
    low: float | None = 0.0
    high: float | None = None


def colour(name: str | int) -> str:
    """Return the stand-in for a CSS variable, or for the colour of a series."""
    return _STAND_INS[f"s{name}" if isinstance(name, int) else name]


def draw(height: float, paint: Callable[[matplotlib.axes.Axes], None]) -> str:
    """Return the drawing of ``paint`` as SVG for inlining.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "report", "The report")
    buffer = io.StringIO()
    with _quiet(), matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        paint(axes)
        _plain_axes(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), height)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings about characters that matplotlib's font lacks; the browser's fonts show them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _plain_axes(axes: matplotlib.axes.Axes) -> None:
    for spine in axes.spines.values():
        spine.set_color(colour("rule"))
    axes.tick_params(colors=colour("rule"), labelcolor=colour("muted"))
    axes.xaxis.label.set_color(colour("muted"))
    axes.yaxis.label.set_color(colour("muted"))


def _inline(svg: str, height: float) -> str:
    """Return the drawing without prologue, with unique ids, the page's colours and the page's font."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" aria-hidden="true" focusable="false">'
    svg = head + svg[svg.index(">") + 1 :]
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([\w-]+)', svg))
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"xlink:href=\"#|url\(#", lambda m: m[0].replace("xlink:", "") + prefix, svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    for name, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return re.sub(r">\s+<", "><", svg)


def panel(what: Panel) -> Chart | None:
    """Draw lines over the layers or tokens; None if no value was measured."""
    lines = [line for line in what.lines if known(line.ys)]
    if not lines:
        return None

    def paint(axes: matplotlib.axes.Axes) -> None:
        for line in lines:
            _paint_line(axes, line)
        _limits(axes, what, lines)
        axes.grid(axis="y", color=colour("rule"), linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="y", nbins=5)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel(what.xlabel)
        axes.set_ylabel(what.ylabel)

    return Chart(what.title, draw(235, paint), _told(what, lines), what.note, what.keys)


def _paint_line(axes: matplotlib.axes.Axes, line: Line) -> None:
    ys = [float("nan") if y is None else y for y in line.ys]
    marked = not line.faint and not line.dashed and len(ys) <= 40
    axes.plot(
        line.xs,
        ys,
        color=colour(line.colour),
        linewidth=1.0 if line.faint else 1.5 if line.dashed else 2.0,
        alpha=0.45 if line.faint else 1.0,
        linestyle=(0, (4, 3)) if line.dashed else "-",
        marker=MARKERS[line.colour] if marked else "_" if len(ys) == 1 else "",
        markersize=4.0 if marked else 14.0,
        clip_on=False,
        zorder=2 if line.faint else 3,
    )


def _limits(axes: matplotlib.axes.Axes, what: Panel, lines: Sequence[Line]) -> None:
    ys = [y for line in lines for y in known(line.ys)]
    xs = [x for line in lines for x in line.xs]
    low = min([*ys, *([] if what.low is None else [what.low])])
    high = max([*ys, *([] if what.high is None else [what.high])])
    room = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - (0.0 if low == what.low else room), high + (0.0 if high == what.high else room))
    side = 0.02 * (max(xs) - min(xs)) or 1.0
    axes.set_xlim(min(xs) - side, max(xs) + side)


def _told(what: Panel, lines: Sequence[Line]) -> str:
    """Describe the course of each line in words."""
    parts = []
    for line in lines:
        ys = known(line.ys)
        course = number(ys[0]) if len(ys) == 1 else f"first {number(ys[0])}, last {number(ys[-1])}"
        parts.append(f"{line.label}: {course}, from {number(min(ys))} to {number(max(ys))}")
    return f"{what.title}, {what.ylabel} against {what.xlabel}. " + "; ".join(parts[:12]) + "."
