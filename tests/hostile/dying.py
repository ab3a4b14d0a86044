"""Jobs that run in forks of a process that has imported what they need, and may kill themselves on the way."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Points = Mapping[str, tuple[Any, str]]
"""Name to the holder of a function and its name there."""


def watch(points: Points, name: str, last: int) -> None:
    """Die by SIGKILL at the ``last`` call of a function."""
    holder, attribute = points[name]
    real: Callable[..., Any] = getattr(holder, attribute)
    count = 0

    def call(*args: Any, **keys: Any) -> Any:
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keys)

    setattr(holder, attribute, call)


def forked(run: Callable[[], Any]) -> int:
    """Run in a fork and return its exit code (negative: the signal).

    What a fork that returns has imported of the library is imported here too, once for all forks after it.
    """
    gc.collect()
    gc.freeze()  # the forks' own collections need not look at what was here before
    with tempfile.TemporaryFile("w+") as imported:
        child = os.fork()
        if child == 0:
            try:
                run()
                imported.write("\n".join(name for name in sys.modules if name.startswith("llamamoe.")))
                imported.flush()
            except BaseException as error:  # a fork must not come back into the caller's loop
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        imported.seek(0)
        for name in imported.read().split():
            importlib.import_module(name)
    return code


def serve(points: Points, run: Callable[[dict[str, Any]], Any]) -> None:
    """Run a job for every line of the input, each in a fork; its ``at`` is [function, call] to die at, or null."""
    for line in sys.stdin:
        job = json.loads(line)

        def work(job: dict[str, Any] = job) -> None:
            if job["at"]:
                watch(points, *job["at"])
            run(job)

        sys.stdout.write(f"{forked(work)}\n")
        sys.stdout.flush()


def run_jobs(module: str, jobs: list[dict[str, Any]], **env: str) -> list[int]:
    """Exit codes (negative: the signal) of one run for each job, one after another, by a module that serves them."""
    found = subprocess.run(
        [sys.executable, "-m", f"tests.hostile.{module}"],
        input="".join(json.dumps(job) + "\n" for job in jobs), capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env, cwd=ROOT,
    )  # fmt: skip
    assert "Error" not in found.stderr, found.stderr
    return [int(line) for line in found.stdout.split()]
