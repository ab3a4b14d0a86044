"""A process that forks commands and cuts a file short, in place, while they read it. Run by test_truncation.py.

Reads one JSON object per line: ``{"args": [...], "file": path, "at": [where, n]}``: at the n-th call of a function of
safetensors (`CALLED`), or progress of a stage of that name. Writes one per line: ``{"exit": code, negative for a signal,
"cut": whether it came to that, "err": stderr}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from click.testing import CliRunner
from llamamoe_cli.main import root

import llamamoe.training.trainer  # noqa: F401  # what a command imports, once for all forks
from llamamoe.progress import Progress

CALLED = ("get_slice", "get_tensor")
"""When the file is open and before its contents are read."""


def watch(name: str, reached: Callable[[], None]) -> None:
    """Call ``reached`` at every such call or progress."""
    if name in CALLED:
        sys.setprofile(lambda _, event, arg: reached() if event == "c_call" and arg.__name__ == name else None)
        return
    real = Progress.__init__

    def init(self: Progress, stage: str, *args: Any, **keys: Any) -> None:
        real(self, stage, *args, **keys)
        if stage == name:
            reached()

    Progress.__init__ = init  # type: ignore[method-assign]


def run(job: dict[str, Any]) -> dict[str, Any]:
    name, last = job["at"]
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == last:
            os.truncate(job["file"], 0)

    watch(name, reached)
    found = CliRunner().invoke(root, job["args"])
    sys.setprofile(None)
    return {"exit": found.exit_code, "cut": count >= last, "err": found.stderr}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.write(write, json.dumps(run(json.loads(line))).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write((answer or json.dumps({"exit": status, "cut": True, "err": ""})) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
