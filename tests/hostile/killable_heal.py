"""Heals in a process of its own, which may kill itself on the way. Run by test_heal_kills.py.

Reads one JSON object: ``{"args": [model, out], "parent": ..., "given": {...}, "keys": {...}, "at": [function, n] or
null}``: the process dies by SIGKILL at the n-th call of the function.
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
import transformers.models.mixtral.modeling_mixtral  # noqa: F401  # what healing imports, once for all forks
from transformers import AutoTokenizer  # noqa: F401

import llamamoe.calibration.sampled
import llamamoe.scoring  # noqa: F401
from llamamoe.checkpoint import ledger, writer
from llamamoe.healing import heal
from llamamoe.recovery import layers, training
from llamamoe.recovery.ranks import Handoff
from llamamoe.recovery.recipe import load_heal_recipe

POINTS: dict[str, tuple[Any, str]] = {
    "pwrite": (os, "pwrite"),
    "append": (ledger.Ledger, "append"),
    "layer": (layers, "heal_layer"),
    "loss": (training._Joint, "__call__"),
    "give": (Handoff, "give"),
    "write_text": (Path, "write_text"),
    "rename": (Path, "rename"),
    "publish": (writer.CheckpointWriter, "publish"),
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
    """Heal once for every line of the input, each in a fork."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                if job["at"]:
                    watch(*job["at"])
                heal(*job["args"], load_heal_recipe(given=job["given"]), parent=job["parent"], **job["keys"])
            except BaseException as error:  # a fork must not come back into the loop
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
