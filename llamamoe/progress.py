"""Report the progress of long operations to their caller, without printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RESUMED = "resume"
"""The stage that says, once, how many units of an interrupted run are kept."""
LOADING = "load"
"""The stage that says which model's weights are loaded next; it may come between the steps of another stage."""


@dataclass(frozen=True)
class Progress:
    """One step of a long operation.

    Attributes:
        stage: The current operation, for example ``"convert"`` or ``"verify"``.
        done: Units finished so far.
        total: Total number of units.
        unit: The counted unit, for example ``"layer"`` or ``"token"``.
        detail: A short text; may be empty.
        expected_seconds: Estimate of the time of the units that are left, for steps that are long before the first one ends.
    """

    stage: str
    done: int
    total: int
    unit: str
    detail: str = ""
    expected_seconds: float | None = None


ProgressCallback = Callable[[Progress], None]


def counting(stage: str, total: int, unit: str, progress: ProgressCallback) -> Callable[..., None]:
    """Return ``advance(detail, pieces=1)``, which reports piecewise work to ``progress``."""
    done = 0

    def advance(detail: str, pieces: int = 1) -> None:
        nonlocal done
        done += pieces
        progress(Progress(stage, done, total, unit, detail))

    return advance


def ignore_progress(_: Progress) -> None:
    """Do nothing; the callback that is used if the caller gives none."""
