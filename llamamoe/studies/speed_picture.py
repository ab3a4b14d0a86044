"""Draw quality against speed: perplexity and measured speed, both relative to the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..lazy import matplotlib, require
from .picture import COLOURS, MARKERS, NOTE, STYLE, save_figure
from .recipe import STATIC
from .table import Comparison, Row, number, speed_tasks

_WIDTH, _HEIGHT = 3.7, 3.3  # inches of one panel
_GREYS = ("#5A5A5A", "#8A8A8A", "#A5A5A5")
_OFF_SCALE = 10.0  # times the best at the same speed: larger values would compress the rest


def draw_speed(found: Comparison, folder: Path) -> dict[str, str]:
    """Draw ``speed.svg`` and ``speed.png``: a panel for each program and task; return their names by kind.

    Methods in colour, static pruning in grey, each a line through its budgets; the frontier joins measured points that
    no other beats in both. Bars are the minimum and maximum ratio over the rounds. Nothing is drawn if nothing was
    measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    tasks = speed_tasks(found.rows)
    rows = [row for row in found.rows if row.speed and row.ratio is not None]
    if not tasks or all(row.kind == "dense" for row in rows):
        return {}
    for module in ("matplotlib", "matplotlib.backends.backend_agg"):
        require(module, "plot", "Drawing the picture")
    programs = list(dict.fromkeys(program for program, _ in tasks))
    columns = max(sum(each == program for each, _ in tasks) for program in programs)
    with matplotlib.rc_context(STYLE):
        size = (_WIDTH * columns + 0.4, _HEIGHT * len(programs) + 1.2)
        figure = matplotlib.figure.Figure(figsize=size, facecolor="white", layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        panels = figure.subplots(len(programs), columns, squeeze=False, sharey=True)
        for program, line in zip(programs, panels, strict=True):
            own = [task for each, task in tasks if each == program]
            for task, axes in zip(own, line, strict=False):
                _panel(axes, rows, program, task)
            for axes in line[len(own) :]:
                axes.set_visible(False)
        for line in panels:
            line[0].set_ylabel("perplexity, x dense", fontsize=9)
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        model = found.speeds[0]["model"]["name"] if found.speeds else ""
        title = f"{found.source}: quality against speed of the same shapes, measured on {model}"
        figure.suptitle(title, fontsize=11, weight="bold", color="#111111")
        return {f"speed_{kind}": name for kind, name in save_figure(figure, folder, "speed").items()}


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points ``(speed, perplexity)`` that no other equals or beats in both, by speed."""
    best: list[tuple[float, float]] = []
    for speed, perplexity in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not best or perplexity < best[-1][1]:
            best.append((speed, perplexity))
    return best[::-1]


def _panel(axes: matplotlib.axes.Axes, rows: Sequence[Row], program: str, task: str) -> None:
    there = [row for row in rows if task in row.speed.get(program, {})]
    low = min(row.ratio or 1.0 for row in there)
    shown = [row for row in there if (row.ratio or 1.0) <= _OFF_SCALE * low]
    points = [(row.speed[program][task]["ratio"], row.ratio or 1.0) for row in shown]
    edge = frontier(points)
    axes.plot(
        *zip(*edge, strict=True),
        color="#111111",
        linewidth=5,
        alpha=0.12,
        zorder=1,
        label="frontier of the measurements",
    )
    for name, (colour, marker) in _styles(shown).items():
        own = sorted((row for row in shown if row.method == name), key=lambda row: row.speed[program][task]["ratio"])
        rates = [row.speed[program][task] for row in own]
        x = [rate["ratio"] for rate in rates]
        spread = [[r["ratio"] - r["lowest"] for r in rates], [r["highest"] - r["ratio"] for r in rates]]
        y = [row.ratio or 1.0 for row in own]
        axes.errorbar(x, y, xerr=spread, color=colour, marker=marker, markersize=5.5, linewidth=1.5, capsize=2,
                      elinewidth=1.0, label=name, zorder=3)  # fmt: skip
    axes.axvline(1.0, color="#111111", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: number(float(value))))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(visible=True, color="#E6E6E6", linewidth=0.6)
    axes.tick_params(labelsize=8)
    left_out = len(there) - len(shown)
    axes.set_title(f"{program}, {_words(task)}", fontsize=9.5)
    note = f"; {left_out} far above" if left_out else ""
    axes.set_xlabel(f"tokens per second, x dense{note}", fontsize=8.5, color=NOTE)


def _words(task: str) -> str:
    return task.replace("decode", "decoding, batch") if task.startswith("decode") else "reading a prompt"


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return colour and marker by method: the best gets the strongest colour, pruning and other controls grey."""
    kinds = {row.method: row.kind for row in rows}
    methods = [name for name, kind in kinds.items() if kind == "method" and not name.startswith(STATIC)]
    methods.sort(key=lambda name: min(row.perplexity for row in rows if row.method == name))
    found = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(methods)}
    greys = sorted(name for name, kind in kinds.items() if name not in found and kind != "dense")
    found |= {name: (_GREYS[i % len(_GREYS)], MARKERS[-1 - i % len(MARKERS)]) for i, name in enumerate(greys)}
    return found | {name: ("#111111", "o") for name, kind in kinds.items() if kind == "dense"}
