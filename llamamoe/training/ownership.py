"""Decide which files of a run's folder the run wrote: no others are replaced or deleted, whatever their names.

A run first writes a unique id into its folder. Checkpoints and the trained model are assembled in a folder with
that id, and get their names when they are complete, each with a manifest that contains the id.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .._version import __version__
from ..checkpoint.files import check_plain_file, remove_temporaries, sync_path, write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.out_folder import TRAINED, TRAINING_RECIPE_FILE
from ..errors import CheckpointError, LlamaMoeError, RefusedError

RUN = "llamamoe_run.json"
"""The file with the id of the run."""
MARKER = "llamamoe_complete.json"
"""The manifest of a checkpoint, or of the trained model; written last."""
STAGING = ".partial"
"""The folder in which checkpoints and the trained model are assembled."""
RECIPE, METRICS, FACTS = TRAINING_RECIPE_FILE, "metrics.jsonl", "facts.json"
"""The recipe; the metrics; facts about the start, which a resumed run cannot measure again."""
TEACHER = "teacher"
"""The folder of the run that trains the parent first: a run's folder like this one."""
LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name; -1 for any other name."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def named_checkpoints(folder: Path) -> list[Path]:
    """Return everything with the name of a checkpoint, in the order of steps, whatever it is."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def run_id(folder: Path) -> str | None:
    """Return the id of the run that a folder belongs to; None if there is none.

    Raises:
        RefusedError: The file with the id is not a plain file.
        CheckpointError: The file is damaged.
    """
    check_plain_file(folder / RUN)
    if not (folder / RUN).exists():
        return None
    try:
        found = read_json(folder / RUN).get("run")
    except CheckpointError as error:
        raise _damaged_id(folder, error.message) from None
    if not isinstance(found, str) or not found:
        raise _damaged_id(folder, f"{RUN} names no run.")
    return found


def _damaged_id(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what} So it cannot be told which run the folder belongs to.",
        hint="Give another --out; a new run can begin with a checkpoint of this one, by --model.",
    )


def check_owned(folder: Path) -> None:
    """Refuse a folder with an entry under a name of a run's files that the folder's run did not write.

    Raises:
        RefusedError: There is such an entry; the message names the first.
        CheckpointError: It cannot be decided, because the id or a manifest is damaged.
    """
    for name in (LOCK, RUN, RECIPE, METRICS, FACTS):
        check_plain_file(folder / name)
    run = run_id(folder)
    written = [folder / name for name in (RECIPE, METRICS, FACTS, TRAINED, STAGING)]
    there = [path for path in (*named_checkpoints(folder), *written) if path.exists() or path.is_symlink()]
    if run is None and there:
        raise _foreign(there[0], f"is there, but no {RUN}")
    for path in there:
        if path.name == STAGING:
            _check_staging(path, run)
        elif path.name == TRAINED or step_of(path) >= 0:
            manifest_of(path, run)


def manifest_of(path: Path, run: str | None) -> Manifest:
    """Return the manifest of a checkpoint or trained model that a run wrote.

    Raises:
        RefusedError: It was not written by this run.
        CheckpointError: Its manifest is missing or unreadable.
    """
    _check_folder(path)
    try:
        found = read_manifest(path, MARKER)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: {error.message} So nothing tells that this run wrote it: it is neither used nor deleted.",
            hint="Move it away, or give another --out.",
        ) from None
    if found.facts.get("run") != run:
        raise _foreign(path, "was written by another run")
    return found


def check_removable(path: Path, run: str | None) -> None:
    """Refuse to delete a checkpoint or trained model that contains anything that the run did not write.

    Raises:
        RefusedError: There is such a file; the message names it.
    """
    strays = manifest_of(path, run).strays(path)
    if strays:
        raise RefusedError(
            f"{path} also holds {strays[0]!r}, which the run did not write: nothing was deleted.",
            hint="Move it away, or give another --out.",
        )


def _check_folder(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        raise _foreign(path, f"is {'a symbolic link' if path.is_symlink() else 'not a folder'}")


def _check_staging(path: Path, run: str | None) -> None:
    _check_folder(path)
    if (path / RUN).exists() or any(_unowned(path)):
        try:
            owner = run_id(path)
        except LlamaMoeError:
            owner = None
        if owner != run:
            raise _foreign(path, "is where checkpoints are put together, but holds something else")


def _unowned(staging: Path) -> Iterator[Path]:
    """Yield entries that a kill before the id was written cannot have left."""
    return (path for path in staging.iterdir() if not path.name.startswith(".llamamoe-"))


def _foreign(path: Path, what: str) -> RefusedError:
    return RefusedError(
        f"{path} {what}: this run did not write it, so it is neither changed nor deleted.",
        hint="Move it away, or give another --out.",
    )


# ---- functions with effects; only under the folder's lock ----------------------------------------------------------


def begin(folder: Path) -> None:
    """Turn the folder into that of a new run."""
    remove_temporaries(folder)
    write_text(folder / RUN, json.dumps({"run": secrets.token_hex(16), "llamamoe": __version__}) + "\n")
    open_staging(folder)


def open_staging(folder: Path) -> Path:
    """Empty the folder in which checkpoints are assembled, and return it; see `check_owned`."""
    staging = folder / STAGING
    staging.mkdir(exist_ok=True)
    _empty(staging)
    write_text(staging / RUN, (folder / RUN).read_text(encoding="utf-8"))
    return staging


def close_staging(folder: Path) -> None:
    """Remove the staging folder at the end of a run."""
    staging = folder / STAGING
    with suppress(OSError):
        _empty(staging)
        if not any(path.name != RUN for path in staging.iterdir()):
            (staging / RUN).unlink(missing_ok=True)
            staging.rmdir()


def _empty(staging: Path) -> None:
    """Delete everything but the id, which identifies the rest if a kill interrupts this."""
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != RUN:
            path.unlink(missing_ok=True)


def publish(folder: Path, name: str) -> Path:
    """Rename an assembled and synced folder to its name in the run's folder.

    Raises:
        OSError: The name is taken.
    """
    target = folder / name
    (folder / STAGING / name).rename(target)
    sync_path(folder)
    return target


def discard(folder: Path, path: Path) -> None:
    """Delete a checkpoint or trained model, such that a kill leaves it whole or in the staging folder.

    Raises:
        RefusedError: It contains anything that the run did not write; see `check_removable`.
    """
    check_removable(path, run_id(folder))
    dropped = folder / STAGING / f"dropped-{path.name}"
    shutil.rmtree(dropped, ignore_errors=True)
    path.rename(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


def clear(folder: Path) -> None:
    """Delete the files of a run, and nothing else. The id is deleted last, so that a killed call can be repeated.

    Raises:
        RefusedError: It contains a file that is not the run's; nothing was deleted.
    """
    check_owned(folder)
    run = run_id(folder)
    if run is None:
        return
    found = [path for path in (*named_checkpoints(folder), folder / TRAINED) if path.exists()]
    for path in found:
        check_removable(path, run)
    if has_teacher(folder):
        check_owned(folder / TEACHER)
    open_staging(folder)
    for path in found:
        discard(folder, path)
    close_staging(folder)
    if has_teacher(folder):
        clear(folder / TEACHER)
        (folder / TEACHER / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files
            (folder / TEACHER).rmdir()
    for name in (METRICS, RECIPE, FACTS, RUN):
        (folder / name).unlink(missing_ok=True)


def has_teacher(folder: Path) -> bool:
    """Return whether the folder of a run holds the one that trains the parent first."""
    return (folder / TEACHER / RUN).exists() and not (folder / TEACHER).is_symlink()
