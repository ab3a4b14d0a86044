"""Commands in forks of a process that has imported what they need: starting Python, torch and transformers takes longer than a tiny run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
        "transformers.models.mixtral.modeling_mixtral",
        "llamamoe_cli.main",
        "llamamoe_cli.pretrain",
        "llamamoe.models.loading",
        "llamamoe.training.trainer",
        "llamamoe.training.export",
    ]
)


def _run(arguments: Sequence[str], environment: dict[str, str], log: str, at: Sequence[Any]) -> None:
    """Run the command line in a fork, with all that it prints in a file; it dies at a function's call, if one is given."""
    from llamamoe_cli import run

    if at:
        from .hostile.dying import watch
        from .hostile.killable_pretrain import POINTS

        watch(POINTS, *at)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["llamamoe", *arguments]
    run()


class Forks:
    """The command line in one process, or as the ranks of a distributed run; the methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        processes: int = 0,
        die: tuple[int, Sequence[Any]] | None = None,
        *,
        by_hand: bool = False,
    ) -> None:
        """Start ``processes`` ranks, or one process that knows of no others; ``log`` gets what they print.

        ``die`` is a rank, and the call of a function (see `tests.hostile.dying.watch`) at which it kills itself. ``by_hand``:
        without a torchrun that has them meet, and ends all of them when one fails.
        """
        self.log, self._by_hand = log, by_hand
        self.returncode: int | None = None
        self.codes: list[int | None] = []
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}):
            forkserver.ensure_running()
        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )  # where ranks meet, as torchrun has it
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._processes: list[ForkServerProcess] = []
        for rank in range(max(processes, 1)):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                     "TORCHELASTIC_RESTART_COUNT": 0}  # fmt: skip
            if by_hand:
                names = {**names, "TORCHELASTIC_USE_AGENT_STORE": "", "MASTER_PORT": port}
            env = {key: str(value) for key, value in names.items()} if processes else {}
            at = die[1] if die is not None and die[0] == rank else ()
            self._processes.append(FORKS.Process(target=_run, args=(list(arguments), env, str(log), at), daemon=True))
            self._processes[-1].start()

    @property
    def pid(self) -> int:
        """Of the first process."""
        found = self._processes[0].pid
        assert found is not None
        return found

    def poll(self) -> int | None:
        """The exit code, or None while any of them runs; it waits a moment, so that a loop around it leaves them the cores."""
        connection.wait([process.sentinel for process in self._processes], timeout=0.01)
        return None if any(process.is_alive() for process in self._processes) else self.wait()

    def wait(self) -> int:
        """Wait for all; one that fails ends the others."""
        left = {process.sentinel: process for process in self._processes}
        while left:
            for ready in connection.wait(list(left)):
                process = left.pop(ready)  # type: ignore[call-overload]
                process.join()
                self.returncode = self.returncode or process.exitcode
                if process.exitcode and not self._by_hand:
                    for other in left.values():
                        other.kill()
        self.codes = [process.exitcode for process in self._processes]
        assert self.returncode is not None
        return self.returncode

    def communicate(self) -> tuple[str, None]:
        """Wait; return what they printed."""
        self.wait()
        return self.log.read_text(encoding="utf-8"), None
