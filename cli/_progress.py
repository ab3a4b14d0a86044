"""Progress on stderr, for a terminal and for a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from llamamoe.progress import LOADING, RESUMED, Progress, ProgressCallback

from ._format import duration, plural
from ._rich import rich
from ._text import echo

PLAIN_SECONDS = 5.0
"""The least time between two plain lines of one stage."""


class _Clock:
    """Times the stage that is under way; stages follow one another."""

    def __init__(self) -> None:
        self.now = self.began = time.monotonic()
        self.step: Progress | None = None
        self.first = (0, self.now)

    def starts(self, step: Progress) -> bool:
        """Take note of a step; tell whether a stage begins with it."""
        before, last = self.now, self.step
        self.now, self.step = time.monotonic(), step
        if last is not None and step.stage == last.stage and step.done >= last.done:
            return False
        self.began, self.first = before, (step.done, self.now)  # the first unit was under way since the last report
        return True

    def text(self, *, detail: bool) -> str:
        """Return progress, rate and remaining time of the stage, or its duration."""
        step = self.step
        assert step is not None
        parts = [f"{step.done:,} of {plural(step.total, step.unit)}"]
        done, seconds = step.done - self.first[0], self.now - self.first[1]
        if step.done >= step.total:
            parts.append(duration(self.now - self.began))
        elif done > 0 and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:,.0f} {step.unit}s/s" if rate >= 10 else f"{rate:.2g} {step.unit}s/s")
            parts.append(f"{duration((step.total - step.done) / rate)} left")
        return ", ".join(parts + [step.detail] * (detail and step.detail != ""))


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
        elif verbose or step.done >= step.total or clock.now - shown >= PLAIN_SECONDS:
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
