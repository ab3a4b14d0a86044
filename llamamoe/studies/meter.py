"""Report the progress of a study and the memory of a cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..checkpoint.ledger import peak_resident_bytes
from ..lazy import torch
from ..progress import Progress, ProgressCallback


def reset_peak(device: str) -> None:
    """Restart the measurement of the peak, if the system supports it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: resets the peak of resident memory


def peak_bytes(device: str) -> int:
    """Return the peak resident memory since `reset_peak` (since the start, if not on Linux), plus the GPU's."""
    most = 0
    if device.startswith("cuda"):
        most = int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return most + int(line.split()[1]) * 1024
    except OSError:
        pass
    return most + peak_resident_bytes()


class Meter:
    """The progress of a study in floating-point operations, so that the remaining time is meaningful.

    Args:
        flops: Operations of every cell to run.
        progress: The callback.
    """

    UNIT = 10**9

    def __init__(self, flops: Sequence[int], progress: ProgressCallback) -> None:
        self._whole = sum(flops) / self.UNIT
        self._total = max(1, math.ceil(self._whole))
        self._done = 0.0
        self._progress = progress
        self._last: Progress | None = None

    def cell(self, label: str, flops: int) -> Callable[[float], None]:
        """Return a callback for one cell, to be called with the finished share."""
        start, whole = self._done, flops / self.UNIT

        def advance(share: float) -> None:
            self._done = start + share * whole
            done = self._total if self._done > self._whole - 1e-6 else int(self._done)
            step = Progress("compare", done, self._total, "GFLOP", label)
            if step != self._last:
                self._last = step
                self._progress(step)

        return advance
