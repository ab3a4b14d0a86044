"""A process that forks conversions and lets them be killed at the n-th call of a function. Run by test_kills.py.

Reads one JSON object per line: ``{"args": [source, out, recipe], "keys": {...}, "at": [function, n, signal] or null}``.
Writes one per line: ``{"signal": number or 0, "error": [class, exit code, text] or null, "calls": {function: n}}``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.cluster  # noqa: F401  # what a conversion imports, once for all forks
import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401

import llamamoe
from llamamoe.calibration import states, walk
from llamamoe.checkpoint import files, ledger, tokenizer, writer
from llamamoe.conversion import session, texts, weights
from llamamoe.conversion.verify import verify_conversion  # noqa: F401
from tests.hostile.dying import forked

POINTS: dict[str, tuple[Any, ...]] = {
    "pwrite": (os, "pwrite"),
    "fdatasync": (os, "fdatasync"),
    "fsync": (os, "fsync"),
    "append": (ledger.Ledger, "append"),
    "finish": (writer.CheckpointWriter, "finish"),
    "layer": (weights, "convert_layer"),
    "enter": (walk.Walk, "enter"),
    "leave": (walk.Walk, "leave"),
    "save": (states.KeptStates, "save"),
    "text": (texts, session, "make_text"),
    "rmtree": (shutil, "rmtree"),
    "write_text": (files, tokenizer, "write_bytes"),
    "replace": (os, "replace"),
    "rename": (Path, "rename"),
    "unlink": (Path, "unlink"),
    "publish": (writer.CheckpointWriter, "publish"),
}
"""Every module or class that holds the function, and its name."""


def watch(name: str, calls: Counter[str], at: list[Any] | None) -> None:
    *holders, attribute = POINTS[name]
    real: Callable[..., Any] = getattr(holders[0], attribute)

    def call(*args: Any, **keys: Any) -> Any:
        if files._UNSYNCED.get():  # a trial in a scratch folder, before there is anything to finish
            return real(*args, **keys)
        calls[name] += 1
        if at is not None and at[0] == name and at[1] == calls[name]:
            if name == "append" and at[2] == signal.SIGKILL:  # half a line reaches the disk
                args[0]._file.write(json.dumps(args[1])[:20])
                args[0]._file.flush()
            if name == "pwrite" and at[2] == signal.SIGKILL:  # and half a tensor
                real(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), at[2])
        return real(*args, **keys)

    for holder in holders:
        setattr(holder, attribute, call)


def convert(job: dict[str, Any]) -> dict[str, Any]:
    source, out, given = job["args"]
    calls: Counter[str] = Counter()
    at = job["at"]

    def progress(step: Any) -> None:
        calls[step.stage] += 1
        if at is not None and at[0] == step.stage and at[1] == calls[step.stage]:
            os.kill(os.getpid(), at[2])

    for name in POINTS:
        watch(name, calls, at)
    error = None
    try:
        llamamoe.split(source, out, llamamoe.load_recipe(given=given), progress=progress, **job["keys"])
    except (llamamoe.LlamaMoeError, KeyboardInterrupt) as found:
        error = [type(found).__name__, getattr(found, "exit_code", 130), str(found)]
    return {"signal": 0, "error": error, "calls": calls}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()

        def work(job: dict[str, Any] = job, read: int = read, write: int = write) -> None:
            os.close(read)
            os.dup2(2, 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(write, json.dumps(convert(job)).encode())

        killed = max(0, -forked(work))
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        sys.stdout.write((answer or json.dumps({"signal": killed, "error": None, "calls": {}})) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
