"""End a run after a checkpoint on SIGTERM, which schedulers send before a time limit, preemption or shutdown."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..lazy import dist, torch

AT_ONCE = 10.0
"""Seconds in which further signals count as the same, since a supervisor and torchrun may both send one."""


class StopRequest:
    """The request to end this process, and its time."""

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0

    def agreed(self, device: torch.device | str) -> bool:
        """Return whether any rank was asked to end; every rank must call it, and all get the same result."""
        from .ranks import all_reduced, several_ranks

        if not several_ranks():  # no need for a device
            return self.asked
        return bool(all_reduced(torch.tensor(float(self.asked), device=device), dist.ReduceOp.MAX))


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM into a request; another one, seconds later, ends the process as usual.

    Only the main thread can receive signals: in other threads there is never a request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def ask(number: int, frame: Any) -> None:
        if not request.asked:
            request.asked, request.since = True, time.monotonic()
        elif time.monotonic() - request.since > AT_ONCE:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
