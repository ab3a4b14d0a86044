"""One picture and one table of what a conversion costs and brings: perplexity over dense against measured speed over dense.

    python benchmarks/quality_speed.py RESULT.json ... [--source-neurons 1536]

RESULT.json are what `benchmarks/alignment.py` wrote; static pruning by layers is that of a study of `llamamoe compare`; speeds
of the same shapes come from ``results/shape_speed.json`` (a 1B-shaped model). Writes ``results/quality-speed.svg`` and ``.png``, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamoe.studies.speed.shapes import FfnShape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.pictures import picture

RESULTS = Path(__file__).parent / "results"
TASKS = {"decode 1": "decode", "prefill": "prefill 256"}
SPEEDS = ("shape_speed.json",)
PROGRAMS = ("llama.cpp", "transformers")
STYLES = {
    ("static", "layer"): ("static pruning, each layer refitted", "#8A8A8A", "s", "--"),
    ("static", "all"): ("static pruning, all layers learned", "#333333", "s", "-"),
    ("experts", "layer"): ("experts, each layer refitted", "#6FA8DC", "o", "--"),
    ("experts", "all"): ("experts, all layers learned", "#0072B2", "o", "-"),
}
"""Label, colour, marker and line of a kind of conversion."""
Speeds = dict[str, dict[str, Any]]
"""Rates by the name of a shape and program."""


@dataclass(frozen=True)
class Point:
    """One conversion: its perplexity over dense, and the speed of its shape over dense by program and task."""

    kind: tuple[str, str]
    shape: str
    tokens: int
    perplexity: float
    speeds: dict[str, dict[str, dict[str, float]]]


def measured_speeds() -> Speeds:
    """Rates over dense by shape's name, program and task."""
    found: Speeds = {}
    for row in [row for path in SPEEDS for row in json.loads((RESULTS / path).read_text())["rows"]]:
        found.setdefault(FfnShape(**row["shape"]).name, {})[row["program"]] = row["rates"]["shape"]
    return found


def points(paths: list[Path], neurons: int, speeds: Speeds) -> Iterator[Point]:
    """The arms of the files that are refitted or learned, with all of their seeds together."""
    for path in paths:
        data = json.loads(path.read_text())
        sizes = {key: int(data["sizes"][key]) for key in ("experts", "top_k", "shared", "active", "calibration_tokens")}
        by_arm: dict[str, list[dict[str, Any]]] = {}
        for each in data["arms"]:
            by_arm.setdefault(each["arm"], []).append(each)
        for arm, seeds in by_arm.items():
            static = arm.startswith("static")
            if static:
                shape = FfnShape(0, 0, sizes["active"] / neurons)
            else:
                shape = FfnShape(sizes["experts"], sizes["top_k"], sizes["shared"] / neurons)
            learned = "learned" in arm
            tokens = sizes["calibration_tokens"] + (int(seeds[0]["tokens"]) if learned else 0)
            mean = sum(each["perplexity_over_dense"] for each in seeds) / len(seeds)
            kind = ("static" if static else "experts", "all" if learned else "layer")
            yield Point(kind, shape.name, tokens, mean, speeds.get(shape.name, {}))


def pruned_by_layers(path: Path, speeds: Speeds) -> Iterator[Point]:
    """Static pruning with `distill`, each layer by itself, from a study of ``llamamoe compare``."""
    study = json.loads(path.read_text())
    for row in study["rows"]:
        name = FfnShape(0, 0, row["budget"]).name if row["method"] == "static + distill" else ""
        if name in speeds:
            tokens = int(study["recipe"]["calibration_tokens"])
            yield Point(("static", "layer"), name, tokens, row["ratio"], speeds[name])


def table(found: list[Point]) -> str:
    """Markdown, a row for each point."""
    head = [f"{program}: {name}" for program in PROGRAMS for name in TASKS.values()]
    lines = ["| conversion | shape | tokens | perplexity, x dense | " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (4 + len(head)))
    for each in found:
        rates = [each.speeds.get(program, {}).get(task) for program in PROGRAMS for task in TASKS]
        shown = [f"{rate['ratio']:.2f}" if rate else "" for rate in rates]
        label = STYLES[each.kind][0]
        cells = [label, each.shape, f"{each.tokens:,}", f"**{each.perplexity:.2f}**", *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: list[Point], program: str, task: str) -> None:
    """Lines through the shapes of each kind, bars over the turns of the measurement."""
    there = [each for each in found if task in each.speeds.get(program, {})]
    with picture(RESULTS / "quality-speed", (7.4, 4.2)) as axes:
        axes.plot(1, 1, "*", color="#111111", markersize=11, linestyle="none", label="dense parent")
        for kind, (label, colour, marker, line) in STYLES.items():
            own = sorted(
                (each for each in there if each.kind == kind), key=lambda each: each.speeds[program][task]["ratio"]
            )
            if not own:
                continue
            rates = [each.speeds[program][task] for each in own]
            x, y = [rate["ratio"] for rate in rates], [each.perplexity for each in own]
            spread = [[r["ratio"] - r["lowest"] for r in rates], [r["highest"] - r["ratio"] for r in rates]]
            axes.errorbar(x, y, xerr=spread, color=colour, marker=marker, linestyle=line, linewidth=1.6, capsize=2,
                          elinewidth=0.8, label=label)  # fmt: skip
            for each, across, up in zip(own, x, y, strict=True):
                left = kind[0] == "experts"  # of the bar, where static pruning's are not
                axes.annotate(f"{each.shape}, {each.tokens / 1000:,.0f} k tokens", (across, up), (-5 if left else 5, 5),
                              textcoords="offset points", ha="right" if left else "left", fontsize=7.5, color=colour)  # fmt: skip
        axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        limits = axes.get_ylim()
        axes.set_yticks([1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5])
        axes.set_ylim(limits)  # ticks beyond them would widen the picture
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.margins(x=0.14)
        axes.set_xlabel(f"tokens per second over the dense parent's ({program}, {TASKS[task]}, one sequence)")
        axes.set_ylabel("perplexity over the dense parent's")
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def main() -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--source-neurons", type=int, default=1536, help="of one FFN of the model that was converted")
    parser.add_argument("--study", type=Path, default=RESULTS / "compare-smollm2" / "comparison.json")
    parser.add_argument("--program", default="llama.cpp", choices=PROGRAMS)
    parser.add_argument("--task", default="decode 1", choices=list(TASKS))
    options = parser.parse_args()
    speeds = measured_speeds()
    found = [*pruned_by_layers(options.study, speeds), *points(options.results, options.source_neurons, speeds)]
    draw(found, options.program, options.task)
    print(table(found))


if __name__ == "__main__":
    main()
