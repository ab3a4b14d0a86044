"""SIGTERM ends a run after a checkpoint: what schedulers send before a time limit, a preemption or a shutdown."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StopRequest:
    """Whether this process was told to end."""

    def __init__(self) -> None:
        self.asked = False

    def agreed(self, device: torch.device | str) -> bool:
        """Whether any rank was told to end; every rank must call it, and all get the same answer."""
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """SIGTERM makes a request of it meanwhile, a second one ends the process as it would have without us.

    Only the main thread can take signals: elsewhere nothing ever asks.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
