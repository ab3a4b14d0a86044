"""Bytes that torch's allocator has handed out: a state, and a peak over a stretch of a run, on CPU and GPU."""

from __future__ import annotations

import time

import torch


def meter_of(device: str) -> CpuMeter | CudaMeter:
    """A context manager: ``begin()`` starts the stretch, the last ``mark()`` ends it; then read ``state`` and ``peak``."""
    return CudaMeter() if device == "cuda" else CpuMeter()


class CpuMeter:
    """Live bytes over time, from the allocator's own reports."""

    def __enter__(self) -> CpuMeter:
        """Start to listen."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        self._begin, self._marks = 0, []
        return self

    def begin(self) -> None:
        """The peak counts from here on."""
        self._begin = time.time_ns()

    def mark(self) -> None:
        """Take the memory in use now as the state, and end the peak here."""
        self._marks.append(time.time_ns())

    def __exit__(self, *error: object) -> None:
        """Sum up."""
        self._profile.__exit__(None, None, None)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = self.peak = 0
        self.state = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            if self._begin <= event.start_ns() <= self._marks[-1]:
                self.peak = max(self.peak, live)
            if event.start_ns() <= self._marks[-1]:
                self.state = live


class CudaMeter:
    """The same from torch's CUDA allocator."""

    def __enter__(self) -> CudaMeter:
        """Nothing to start."""
        return self

    def begin(self) -> None:
        """The peak counts from here on."""
        torch.cuda.reset_peak_memory_stats()

    def mark(self) -> None:
        """Take the memory in use now as the state, and end the peak here."""
        self.state, self.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()

    def __exit__(self, *error: object) -> None:
        """Nothing to stop."""
