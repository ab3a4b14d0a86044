"""Work in processes: results, errors, and processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamamoe.data.processes import spread
from llamamoe.errors import LlamaMoeError, UsageError


def squarer(offset: int) -> Callable[[int], tuple[int, int]]:
    def work(job: int) -> tuple[int, int]:
        if job == 97:
            raise UsageError("ninety-seven", hint="take another")
        if job == 98:
            os.kill(os.getpid(), signal.SIGKILL)
        if job == 99:
            raise OSError(28, "No space left on device", "file")
        return job * job + offset, os.getpid()

    return work


def broken(_: int) -> Callable[[int], int]:
    raise LlamaMoeError("no setup")


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_once(workers):
    found = dict(spread(squarer, 1, [5, 6, 7, 8, 9], workers))
    assert {number: result for number, (result, _) in found.items()} == {0: 26, 1: 37, 2: 50, 3: 65, 4: 82}
    here = {pid == os.getpid() for _, pid in found.values()}
    assert here == {workers == 1}
    assert "TOKENIZERS_PARALLELISM" not in os.environ or os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_no_job():
    assert list(spread(squarer, 1, [], 4)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_arrive_whole(workers):
    with pytest.raises(UsageError, match="ninety-seven") as caught:
        list(spread(squarer, 0, [97, 97], workers))
    assert caught.value.hint == "take another"
    with pytest.raises(OSError, match="No space left") as full:
        list(spread(squarer, 0, [99, 99], workers))
    assert full.value.errno == 28
    with pytest.raises(LlamaMoeError, match="no setup"):
        list(spread(broken, 0, [1, 2], workers))


def test_a_process_that_is_killed_is_an_error_not_a_wait():
    with pytest.raises(LlamaMoeError, match="a worker process ended unexpectedly") as caught:
        list(spread(squarer, 0, [1, 98, 2, 3], 2))
    assert "--resume" in (caught.value.hint or "")


def test_leaving_early_stops_the_processes():
    results = spread(squarer, 0, list(range(50)), 2)
    _, (_, pid) = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_script_without_a_guard_is_an_error_not_a_wait(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from llamamoe.data.processes import spread\n"
        "print(list(spread(str.startswith, 'more than a pipe holds' * 100_000, ['a', 'b'], 2)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "LlamaMoeError: a worker process ended unexpectedly (exit code 1)" in done.stderr
    assert '`if __name__ == "__main__":`' in done.stderr
