"""Progress on stderr, for a terminal and for a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from llamamoe.progress import LOADING, RESUMED, Progress, ProgressCallback

from ._format import duration, plural
from ._rich import rich
from ._text import echo

PLAIN_SECONDS = 5.0
"""The least time between two plain lines of one stage."""
_PACES, _PACE_SECONDS = 15, 1.0
"""The remaining time follows the median of the last paces, each over a second at least: a pause is soon forgotten."""


class _Clock:
    """Times the stage that is under way; stages follow one another."""

    def __init__(self) -> None:
        self.now = self.began = time.monotonic()
        self.step: Progress | None = None
        self.last = (0, self.now)
        self.paces: deque[float] = deque(maxlen=_PACES)

    def starts(self, step: Progress) -> bool:
        """Take note of a step; tell whether a stage begins with it."""
        before, last = self.now, self.step
        self.now, self.step = time.monotonic(), step
        if last is not None and step.stage == last.stage and step.done >= last.done:
            self._measure(step)
            return False
        self.began, self.last = before, (step.done, self.now)  # the first unit was under way since the last report
        self.paces.clear()
        return True

    def _measure(self, step: Progress) -> None:
        done, seconds = step.done - self.last[0], self.now - self.last[1]
        if done > 0 and (seconds >= _PACE_SECONDS or not self.paces):
            self.paces.append(seconds / done)
            self.last = (step.done, self.now)

    def text(self, *, detail: bool) -> str:
        """Return progress, rate and remaining time of the stage, or its duration."""
        step = self.step
        assert step is not None
        parts = [f"{step.done:,} of {plural(step.total, step.unit)}"]
        pace = median(self.paces) if self.paces else 0.0
        if step.done >= step.total:
            parts.append(duration(self.now - self.began))
        elif pace > 0:
            parts.append(f"{1 / pace:,.0f} {step.unit}s/s" if pace <= 0.1 else f"{1 / pace:.2g} {step.unit}s/s")
            parts.append(f"{duration((step.total - step.done) * pace)} left")
        elif step.expected_seconds is not None:
            parts.append(f"about {duration(step.expected_seconds)} expected")
        return ", ".join(parts + [step.detail] * (detail and step.detail != ""))


def _due(step: Progress, seconds: float) -> bool:
    return seconds >= PLAIN_SECONDS or (step.expected_seconds or 0) >= PLAIN_SECONDS


def _loading(step: Progress) -> str:
    return f"{step.stage}: model {step.done:,} of {step.total:,}, {step.detail}"


@contextmanager
def plain_lines(*, verbose: bool) -> Iterator[ProgressCallback]:
    """One line when a stage ends, and every few seconds while it lasts; with ``verbose`` one for every step."""
    clock = _Clock()
    shown = clock.now

    def report(step: Progress) -> None:
        nonlocal shown
        if step.stage == LOADING:
            echo(_loading(step), err=True)
            return
        clock.starts(step)
        if step.stage == RESUMED:
            echo(f"{step.stage}: {step.done:,} of {plural(step.total, step.unit)} kept", err=True)
        elif verbose or step.done >= step.total or _due(step, clock.now - shown):
            shown = clock.now
            echo(f"{step.stage}: {clock.text(detail=verbose)}", err=True)

    yield report


@contextmanager
def live_bar(*, verbose: bool) -> Iterator[ProgressCallback]:
    """One bar for each stage; finished ones stay."""
    text = rich.progress.TextColumn
    columns = (text("{task.description}"), rich.progress.BarColumn(bar_width=12), text("{task.fields[text]}"))
    clock, console = _Clock(), rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, refresh_per_second=4) as bars:
        task = waiting = bars.add_task("start", total=None, text="")

        def report(step: Progress) -> None:
            nonlocal task
            if step.stage == LOADING:
                bars.update(waiting, description=_loading(step), visible=True)
                return
            bars.update(waiting, visible=False)
            if clock.starts(step):
                task = bars.add_task(step.stage, total=step.total, text="")
            bars.update(task, completed=step.done, text=clock.text(detail=verbose))

        try:
            yield report
        finally:
            bars.update(waiting, visible=False)
