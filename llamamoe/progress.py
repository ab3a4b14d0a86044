"""How long work tells its caller how far it is, without printing anything itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of a long operation.

    Attributes:
        stage: What is being done, for example ``"convert"`` or ``"verify"``.
        done: Units finished so far.
        total: Units in all.
        unit: What is counted, for example ``"layer"`` or ``"token"``.
        detail: A short free text, may be empty.
    """

    stage: str
    done: int
    total: int
    unit: str
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


def counting(stage: str, total: int, unit: str, progress: ProgressCallback) -> Callable[..., None]:
    """What tells ``progress`` of work that comes piece by piece: ``advance(detail, pieces=1)``."""
    done = 0

    def advance(detail: str, pieces: int = 1) -> None:
        nonlocal done
        done += pieces
        progress(Progress(stage, done, total, unit, detail))

    return advance


def ignore_progress(_: Progress) -> None:
    """The callback that is used when the caller gives none."""
