"""Measure the speed of shapes of conversions, the dense parent and static pruning, on a 1B-shaped model.

    python benchmarks/shape_speed.py [--runtimes transformers llama.cpp] [--runs 1] [--work FOLDER]

Resumable: each shape and program is a small file in FOLDER. llama.cpp needs an interpreter with ``xllamacpp``, this one or the
one that ``LLAMAMOE_CLIENTS_PYTHON`` names. ``results/shape_speed.json`` gets all that is there, and keeps
the rows of other shapes; ``--publish`` writes the table that
``split --prefer`` chooses from, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from llamamoe.conversion import expected_speed
from llamamoe.studies.speed.shapes import MODEL_SHAPES, FfnShape
from llamamoe.studies.speed.store import SpeedStore
from llamamoe.studies.speed.wanted import Wanted

EIGHTH, QUARTER, MORE = 0.125, 0.25, 0.375
SHAPES = {
    "about half of the FFN": [
        FfnShape(0, 0, 0.5),
        FfnShape(8, 3, EIGHTH),
        FfnShape(16, 6, EIGHTH),
        FfnShape(32, 12, EIGHTH),
        FfnShape(56, 21, EIGHTH),
        FfnShape(64, 24, EIGHTH),
        FfnShape(16, 5, QUARTER),
        FfnShape(32, 10, QUARTER),
        FfnShape(48, 15, QUARTER),
        FfnShape(8, 1, MORE),
        FfnShape(16, 3, MORE),
        FfnShape(32, 5, MORE),
        FfnShape(40, 7, MORE),
        FfnShape(8, 4, 0.0),
        FfnShape(16, 8, 0.0),
        FfnShape(32, 16, 0.0),
    ],
    "about a quarter of the FFN": [
        FfnShape(0, 0, 0.25),
        FfnShape(8, 1, EIGHTH),
        FfnShape(16, 2, EIGHTH),
        FfnShape(32, 4, EIGHTH),
        FfnShape(56, 7, EIGHTH),
        FfnShape(64, 8, EIGHTH),
        FfnShape(8, 2, 0.0),
        FfnShape(16, 4, 0.0),
        FfnShape(32, 8, 0.0),
    ],
}
RESULTS = Path(__file__).parent / "results" / "shape_speed.json"
PACKAGED = Path(expected_speed.__file__).with_name(expected_speed.TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="*", default=["llama.cpp", "transformers"])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/shape_speed"))
    parser.add_argument("--room", type=Path, help="on whose disk models are made (6 GB at most)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1000, help="stop after so many runs, each of some shapes")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--publish", action="store_true", help="write the table that comes with the package, too")
    parser.add_argument(
        "--only", nargs="*", default=[], help="shapes by name, such as '15 of 48 + 1/4'; all if none is named"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    left = iter(range(options.runs))
    store = SpeedStore(options.work, MODEL_SHAPES["1B"], room=options.room)
    wanted = [Wanted(name, shape) for name in options.runtimes for shapes in SHAPES.values() for shape in shapes]
    chosen = [each for each in wanted if not options.only or each.shape.name in options.only]
    failed = store.measure(chosen, lambda text: print(text, flush=True), lambda: next(left, None) is not None)
    for each, reason in failed:
        print(f"not measured: {each.label}: {reason}")
    rows = [found for each in wanted if (found := store.load(each)) is not None]
    for row in rows:
        row.pop("depends")
    rows += earlier(options.json, rows)
    options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    if options.publish:
        publish(rows)
    print(f"{len(rows)} of {len(wanted)} measured")
    for row in rows:
        print(describe(row))


def earlier(path: Path, rows: list[dict]) -> list[dict]:
    """The rows of an earlier run for shapes that this one lacks; each names its machine."""
    if not path.exists():
        return []
    there = [(row["program"], row["shape"]) for row in rows]
    return [row for row in json.loads(path.read_text())["rows"] if (row["program"], row["shape"]) not in there]


def publish(rows: list[dict]) -> None:
    """Write what `llamamoe.conversion.expected_speed` reads; rates rounded, the dense model's left out, one row a line."""
    keys = ("program", "shape", "sizes", "active_share", "turns", "measured", "versions", "threads", "model", "machine")
    lines = []
    for row in rows:
        rates = {
            name: {task: {k: round(v, 3) for k, v in rate.items()} for task, rate in tasks.items()}
            for name, tasks in row["rates"].items()
            if name != "dense"
        }
        lines.append(json.dumps({key: row[key] for key in keys} | {"rates": rates}))
    text = '{"made_by": "benchmarks/shape_speed.py --publish", "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    PACKAGED.write_text(text, encoding="utf-8")


def describe(row: dict) -> str:
    """One line: the shape, and its speed over dense by task."""
    rates = row["rates"]["shape"]
    shown = "  ".join(f"{task} {r['ratio']:.2f} [{r['lowest']:.2f}-{r['highest']:.2f}]" for task, r in rates.items())
    return f"{row['program']:12s} {FfnShape(**row['shape']).name:16s} {row['active_share']:.1%}  {shown}"


if __name__ == "__main__":
    main()
