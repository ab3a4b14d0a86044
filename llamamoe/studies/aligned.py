"""Alignments of a study: learned once for all cells that share one, and kept while one of them is unfinished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..alignment.layers import AlignedLayer
from ..alignment.states import load_layers, remove_file, save_layers
from ..calibration.compute import Compute
from ..calibration.text import CalibrationText
from ..conversion.aligning import learn, remove_work
from ..conversion.plan import SplitPlan
from ..progress import Progress

_PREFIX, _RESULT = "alignment-", "aligned.safetensors"
_STARTS_SHARE = 0.1
"""Approximate share of the first layers in the time until a cell can be scored."""


def aligned_layers(
    folder: Path,
    plan: SplitPlan,
    calibration: CalibrationText,
    text: CalibrationText,
    compute: Compute,
    advance: Callable[[float], None],
) -> dict[int, AlignedLayer]:
    """Return the layers that the plan's alignment learns, learning them if no earlier cell has.

    Args:
        folder: Folder of this plan and these texts, see `folder_of`.
        plan: The plan, whose recipe requests alignment.
        calibration: The text for the methods that make the start.
        text: The text for learning.
        compute: Device and dtype.
        advance: Called with the finished share.

    Raises:
        LlamaMoeError: There is too little text, or a value is not finite.
    """
    known = load_layers(folder / _RESULT)
    if known is not None:
        return known

    def report(progress: Progress) -> None:
        share = progress.done / progress.total
        first = progress.unit == "layer"
        advance(_STARTS_SHARE * share if first else _STARTS_SHARE + (1 - _STARTS_SHARE) * share)

    found = learn(plan, calibration, text, compute, folder, report).layers
    save_layers(folder / _RESULT, found)
    remove_work(folder)
    return found


def folder_of(work: Path, identity: str) -> Path:
    """Return where the states of an alignment are: a folder for each plan and text, named by a hash of them."""
    return work / f"{_PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def remove_alignments(work: Path, needed: Iterable[Path]) -> None:
    """Delete the states of all alignments in a folder except those that are still needed."""
    kept = set(needed)
    for folder in work.glob(f"{_PREFIX}*"):
        if folder not in kept and folder.is_dir() and not folder.is_symlink():
            remove_work(folder)
            remove_file(folder / _RESULT)
            with suppress(OSError):  # it contains something else
                folder.rmdir()
