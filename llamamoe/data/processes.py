"""Spread work over processes that end with the one that started them, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from ..errors import LlamaMoeError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


def spread(
    setup: Callable[[S], Callable[[T], R]], shared: S, jobs: Sequence[T], workers: int
) -> Iterator[tuple[int, R]]:
    """Run ``jobs``, each in one process, and yield (number, result) of each when done, in any order.

    With one worker everything runs in this process. With more, processes are spawned, so a script that calls this must
    guard its main part with ``if __name__ == "__main__":``. They ignore Ctrl-C, are stopped as soon as the iterator is
    closed or fails, and end by themselves if this process is killed.

    Args:
        setup: Called once in every process; returns what does one job. A function of a module.
        shared: Argument of ``setup``. It, the jobs and the results are pickled.
        jobs: The jobs, started in this order.
        workers: Maximum number of processes.

    Raises:
        LlamaMoeError: A process ended unexpectedly.
        Exception: The exception that a job raised.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        with _serial_tokenizers():
            work = setup(shared)
            for number, job in enumerate(jobs):
                yield number, work(job)
        return
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, Any] = {}
    waiting = list(reversed(range(len(jobs))))
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, setup), daemon=True)
            process.start()
            there.close()
            pipes[here] = process
        for pipe in pipes:
            _send(pipe, shared)  # as an argument of the process it would block start() forever if that ends early
            _give(pipe, waiting, jobs)
        yield from _collect(pipes, waiting, jobs)
    finally:
        for pipe, process in pipes.items():
            pipe.close()
            process.terminate()
            process.join()


def _give(pipe: Connection, waiting: list[int], jobs: Sequence[Any]) -> None:
    if waiting:
        number = waiting.pop()
        _send(pipe, (number, jobs[number]))


def _send(pipe: Connection, message: Any) -> None:
    with contextlib.suppress(
        BrokenPipeError, ConnectionResetError
    ):  # the end of the process is noticed when it is read from
        pipe.send(message)


def _collect(pipes: dict[Connection, Any], waiting: list[int], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    left = len(jobs)
    while left:
        for pipe in wait(list(pipes)):
            assert isinstance(pipe, Connection)
            try:
                number, result, error = pipe.recv()
            except (EOFError, ConnectionResetError):
                pipes[pipe].join()
                raise _ended(pipes[pipe].exitcode) from None
            if error is not None:
                raise error
            left -= 1
            _give(pipe, waiting, jobs)
            yield number, result


def _ended(exit_code: int) -> LlamaMoeError:
    """Return the error of a worker that ended: by a signal, which a lack of memory often is, or by an error of its start."""
    if exit_code < 0:
        why = "Often memory ran out: use fewer --workers."
    else:
        why = 'A script must guard its main part with `if __name__ == "__main__":`, because every worker imports it.'
    return LlamaMoeError(
        f"a worker process ended unexpectedly (exit code {exit_code}).",
        hint=f"{why} Finished work is kept: continue with --resume.",
    )


def _serve(pipe: Connection, setup: Callable[[Any], Callable[[Any], Any]]) -> None:
    """Run the loop of a worker process, which receives the argument of ``setup`` and then its jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them: the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of the main process is not for its copies
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    number = -1
    try:
        messages = _messages(pipe)
        work = setup(next(messages))
        for number, job in messages:
            pipe.send((number, work(job), None))
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send((number, None, error))


def _messages(pipe: Connection) -> Iterator[Any]:
    """Receive until the main process closes its end."""
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Keep the tokenizer from starting threads, so that one worker uses one core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
