"""The devices of a training run, of which an estimate needs only numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ...errors import UsageError
from .compute import DISK_RATE


@dataclass(frozen=True)
class Hardware:
    """The devices of a run.

    Attributes:
        world_size: Processes of the run, one device each.
        device_memory: Bytes of a device; None: unknown.
        peak_flops: Operations per second of a device, see `llamamoe.training.metrics.PEAK_FLOPS`; None: unknown.
        bandwidth: Bytes per second that a device reads from and writes to its memory; None: unknown.
        utilisation: Share of the peak that is reached.
        disk_rate: Bytes per second of the file system, of all ranks together.

    Raises:
        UsageError: A value is not a finite number above 0.
    """

    world_size: int
    device_memory: float | None = None
    peak_flops: float | None = None
    bandwidth: float | None = None
    utilisation: float = 0.4
    disk_rate: float = DISK_RATE

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{field.name} is {value:g}, but must be a finite number above 0.")

    @property
    def operations_per_second(self) -> float | None:
        """Operations of all devices together; None: unknown."""
        return self.peak_flops * self.world_size * self.utilisation if self.peak_flops else None
