r"""``llamamoe tokenize`` on many nodes, through datatrove's executors. Needs the extra ``cluster``.

    python -m llamamoe_recipes.tokenize.cluster --recipe my.yaml --out /shared/tokens --tasks 512 \
        --executor slurm --partition cpu --time 24:00:00

On one machine ``llamamoe tokenize`` does the same in as many processes as it has cores. Every task is one core and takes its share of the units; a last task puts the result together. Start it again after a
failure: finished units are kept. All nodes must see the same paths.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXECUTORS = {"slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tasks", type=int, default=8, help="at most the number of units of the recipe")
    parser.add_argument("--workers", type=int, default=-1, help="tasks that run at a time; -1: all")
    parser.add_argument("--executor", choices=sorted(EXECUTORS), required=True)
    parser.add_argument("--logs", type=Path, help="datatrove's folder  [default: OUT.logs]")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--qos", default="", help="of Slurm  [default: that of the partition]")
    parser.add_argument("--time", default="24:00:00", help="of Slurm, for a task")
    parser.add_argument("--mem-per-cpu-gb", type=int, default=4, help="of Slurm")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start both jobs, the second after the first."""
    from llamamoe.data.datatrove_pipeline import MergeIndex, TokenizeFiles
    from llamamoe.data.recipe import load_tokenize_recipe

    args = parse(arguments)
    recipe = load_tokenize_recipe(args.recipe, overrides=args.overrides)
    executor: Any = getattr(importlib.import_module(f"datatrove.executor.{args.executor}"), EXECUTORS[args.executor])
    logs = args.logs or args.out.with_name(args.out.name + ".logs")
    keys: dict[str, Any] = {}
    if args.executor == "slurm":
        keys = {"partition": args.partition, "qos": args.qos, "time": args.time, "mem_per_cpu_gb": args.mem_per_cpu_gb}
    files = executor(
        [TokenizeFiles(recipe, args.out, strict=args.strict)],
        tasks=args.tasks,
        workers=args.workers,
        logging_dir=str(logs / "files"),
        **keys,
    )
    executor([MergeIndex(recipe, args.out)], tasks=1, depends=files, logging_dir=str(logs / "merge"), **keys).run()


if __name__ == "__main__":
    main()
