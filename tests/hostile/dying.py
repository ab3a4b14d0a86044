"""Jobs that run in forks of a process that has imported what they need, and may kill themselves on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


def serve(points: Points, run: Callable[[dict[str, Any]], Any]) -> None:
    """Run a job for every line of the input, each in a fork; its ``at`` is [function, call] to die at, or null."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                if job["at"]:
                    watch(points, *job["at"])
                run(job)
            except BaseException as error:  # a fork must not come back into the loop
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
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
