"""The curve of recipes/pretrain/smollm2_cpu.yaml: held-out perplexity by tokens, beside the dense parent trained alike.

    make demo, the commands at the head of the recipe, and for the control
    llamamoe pretrain --recipe smollm2_cpu --model demo-output/dense --out demo-output/control --set allow_dense=true \
        --set losses=[] --set distill=null --set parent=null --set experts_implementation=null
    python benchmarks/training_curve.py --run demo-output/pretrained --control demo-output/control

Writes benchmarks/results/training-smollm2.json, .svg and .png; without --run only draws what the JSON holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llamamoe.training.metrics import read_lines

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.pictures import picture

OUT = Path(__file__).parent / "results" / "training-smollm2.json"
RUNS = {
    "run": ("converted, half of the FFN active", "#0072B2", "-"),
    "control": ("dense parent, trained alike", "#555555", "--"),
}


def curve(folder: Path) -> dict[str, Any]:
    """Validations of a run, and how long it took."""
    lines = read_lines(folder / "metrics.jsonl")
    held_out = [[line["tokens"], line["perplexity"]] for line in lines if line["kind"] == "validation"]
    return {"held_out": held_out, "seconds": lines[-1]["time"]["seconds"]}


def draw(curves: dict[str, Any], path: Path) -> None:
    """Lines with their last value beside them, and the parent as it was."""
    with picture(path, (7.4, 3.6)) as axes:
        parent = curves["control"]["held_out"][0][1]
        axes.axhline(parent, color="#999999", linewidth=1, linestyle=":")
        for name, (label, colour, style) in RUNS.items():
            points = curves[name]["held_out"]
            x = [tokens / 1000 for tokens, _ in points]
            y = [perplexity for _, perplexity in points]
            axes.plot(x, y, style, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
            for at in (0, -1):
                offset, side = ((6, 4), "left") if at == 0 else ((6, -3), "left")
                axes.annotate(f"{y[at]:.1f}", (x[at], y[at]), offset, textcoords="offset points", ha=side, color=colour)
        axes.annotate(
            "dense parent as it was", (x[-1], parent), (0, 4), textcoords="offset points", ha="right", color="#777777",
            fontsize=9,
        )  # fmt: skip
        axes.set_xlim(-4, x[-1] * 1.07)
        axes.set_ylim(bottom=0.9 * min(p for each in curves.values() for _, p in each["held_out"]))
        axes.set_xlabel("tokens of training, in thousands")
        axes.set_ylabel("perplexity of held-out text")
        axes.legend(frameon=False, fontsize=9, loc="upper right")


def main() -> None:
    """Parse, read, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of llamamoe pretrain")
    parser.add_argument("--control", type=Path, help="that of the dense parent")
    options = parser.parse_args()
    if options.run is not None:
        curves = {"run": curve(options.run), "control": curve(options.control)}
        OUT.write_text(json.dumps(curves, indent=1) + "\n")
    curves = json.loads(OUT.read_text())
    draw(curves, OUT)
    for name, (label, *_) in RUNS.items():
        points = curves[name]["held_out"]
        print(f"{label}: {points[0][1]:.2f} -> {points[-1][1]:.2f} in {curves[name]['seconds'] / 60:.0f} min")


if __name__ == "__main__":
    main()
