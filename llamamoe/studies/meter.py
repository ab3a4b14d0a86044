"""How far a study is, and how much memory a cell took."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..checkpoint.ledger import peak_resident_bytes
from ..lazy import torch
from ..progress import Progress, ProgressCallback


def reset_peak(device: str) -> None:
    """Begin to measure the peak anew, where the system can."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the peak of resident memory


def peak_bytes(device: str) -> int:
    """Most resident memory of the process since `reset_peak` (elsewhere than on Linux: since it began), and the GPU's."""
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
    """Tells how far a study is, in floating-point operations, so that the time left means something.

    Args:
        flops: Of every cell that is to be done.
        progress: Is told.
    """

    UNIT = 10**9

    def __init__(self, flops: Sequence[int], progress: ProgressCallback) -> None:
        self._whole = sum(flops) / self.UNIT
        self._total = max(1, math.ceil(self._whole))
        self._done = 0.0
        self._progress = progress

    def cell(self, label: str, flops: int) -> Callable[[float], None]:
        """For one cell: to be called with the share that is done."""
        start, whole = self._done, flops / self.UNIT

        def advance(share: float) -> None:
            self._done = start + share * whole
            done = self._total if self._done > self._whole - 1e-6 else int(self._done)
            self._progress(Progress("compare", done, self._total, "GFLOP", label))

        return advance
