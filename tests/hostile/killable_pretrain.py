"""Trains in a process of its own, which may kill itself on the way. Run by test_pretrain_kills.py.

Reads JSON lines: ``{"recipe": FILE, "out": ..., "resume": ..., "at": [function, n] or null}``: the process dies by SIGKILL
at the n-th call of the function.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  # what training imports, once for all forks

import llamamoe.scoring  # noqa: F401
from llamamoe import pretrain
from llamamoe.training import dynamics, export, metrics, objective, run_folder, trainer
from llamamoe.training.recipe import load_pretrain_recipe

POINTS: dict[str, tuple[Any, str]] = {
    "micro_batch": (objective.Objective, "__call__"),
    "metrics": (metrics.MetricsFile, "write"),
    "optimizer": (torch, "save"),
    "state": (dynamics.Dynamics, "save"),
    "marker": (run_folder, "write_text"),
    "rotate": (trainer, "rotate"),
    "finish": (export, "finish_folder"),
    "rename": (Path, "rename"),
}


def watch(name: str, last: int) -> None:
    """Die at the ``last`` call of a function."""
    holder, attribute = POINTS[name]
    real: Callable[..., Any] = getattr(holder, attribute)
    count = 0

    def call(*args: Any, **keys: Any) -> Any:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keys)

    setattr(holder, attribute, call)


def main() -> None:
    """Train once for every line of the input, each in a fork."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                if job["at"]:
                    watch(*job["at"])
                pretrain(load_pretrain_recipe(job["recipe"]), job["out"], resume=job["resume"])
            except BaseException as error:  # a fork must not come back into the loop
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
