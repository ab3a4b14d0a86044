"""Manage the folder of a training run: its lock and its intact checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.files import InUseError, is_locked, lock, open_append
from ..checkpoint.manifest import FileEntry, Manifest, write_manifest
from ..errors import LlamaMoeError, RefusedError, UsageError
from .metrics import read_lines
from .ownership import LOCK, MARKER, METRICS, discard, manifest_of, named_checkpoints, run_id, step_of
from .recipe import PretrainRecipe

log = logging.getLogger("llamamoe")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other runs; the lock is released when the process ends, however it ends.

    Raises:
        UsageError: Another run holds the lock.
        LlamaMoeError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_append(folder / LOCK)
    except OSError as error:
        raise LlamaMoeError(f"{folder} cannot be used: {error.strerror or error}.") from None
    with file:
        try:
            lock(file)
        except InUseError:
            raise _in_use(folder) from None
        except OSError as error:
            raise LlamaMoeError(f"{folder} cannot be locked: {error.strerror or error}.") from None
        yield


def refuse_used(folder: Path) -> None:
    """Refuse a folder in which another run is working, before its content is read. Changes nothing.

    Raises:
        UsageError: Another run is working in it.
    """
    if is_locked(folder / LOCK):
        raise _in_use(folder)


def _in_use(folder: Path) -> UsageError:
    return UsageError(f"another run is working in {folder}.", hint="Wait for it or stop it, or give another --out.")


def checkpoints(folder: Path) -> list[Path]:
    """Return checkpoints of the folder's run without missing files or files of another size, oldest first."""
    return [path for path in named_checkpoints(folder) if _looks_whole(path)]


def _looks_whole(checkpoint: Path) -> bool:
    try:
        found = manifest_of(checkpoint, run_id(checkpoint.parent))
    except RefusedError:
        return False
    return found.facts.get("step") == step_of(checkpoint) and not any(found.misfits(checkpoint))


def complete(checkpoint: Path, facts: Mapping[str, Any], written: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Sync and hash all files of a checkpoint but those already ``written``, then write the manifest that makes it valid."""
    return write_manifest(checkpoint, MARKER, facts, written)


def is_of_the_disk(error: Exception) -> bool:
    """Return whether an error during writing is the disk's: ``torch.save`` reports it as RuntimeError.

    Its message names the place in torch where the archive or its stream is written.
    """
    told = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    return not isinstance(error, RuntimeError) or any(part in told for part in ("inline_container", "iostream"))


def start_anew(recipe: PretrainRecipe, checkpoint: Path, step: int | None = None) -> str:
    """Describe how to start a new run from a checkpoint; given its step, one that continues in the text."""
    if recipe.lora is not None:  # an adapter alone is not a model
        return "a new run, with another --out"
    skip = "" if step is None else f", data.skip_tokens={(step + recipe.skipped_steps) * recipe.tokens_per_step}"
    return f"a new run that begins there, with model={checkpoint}{skip} and another --out"


def best_checkpoint(folder: Path) -> tuple[Path, float] | None:
    """Return the intact checkpoint with the lowest held-out loss, and that loss; None if none was measured."""
    path = folder / METRICS
    lines = read_lines(path) if path.exists() else []
    validations = (line for line in lines if line.get("kind") == "validation" and line.get("loss") is not None)
    losses: dict[int, float] = {line["step"]: line["loss"] for line in validations}
    found = [(losses[step_of(each)], each) for each in checkpoints(folder) if step_of(each) in losses]
    if not found:
        return None
    loss, checkpoint = min(found, key=lambda pair: pair[0])  # the oldest of equal ones
    return checkpoint, loss


def rotate(folder: Path, keep: int | None) -> None:
    """Delete all but the ``keep`` newest whole checkpoints and the best one; those that contain other files stay."""
    if keep is None:
        return
    best = best_checkpoint(folder)
    for path in checkpoints(folder)[:-keep]:
        if best is not None and path == best[0]:
            continue
        try:
            discard(folder, path)
        except RefusedError as error:
            log.warning("%s", error.message)
        except OSError as error:
            log.warning("%s cannot be deleted: %s", path, error.strerror or error)
