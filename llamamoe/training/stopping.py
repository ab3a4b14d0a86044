"""SIGTERM ends a run after a checkpoint: what schedulers send before a time limit, a preemption or a shutdown."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..lazy import dist, torch

AT_ONCE = 10.0
"""Seconds in which further signals count as the same: a supervisor and torchrun may both send one."""


class StopRequest:
    """A request to end this process, and its time."""

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0

    def agreed(self, device: torch.device | str) -> bool:
        """Return whether any rank was told to end; every rank must call it, and all get the same answer."""
        from .ranks import all_reduced, several_ranks

        if not several_ranks():  # nothing to ask a device for
            return self.asked
        return bool(all_reduced(torch.tensor(float(self.asked), device=device), dist.ReduceOp.MAX))


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM makes a request of it meanwhile; one more, seconds later, ends the process as it would have without us.

    Only the main thread can take signals: elsewhere nothing ever asks.
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
