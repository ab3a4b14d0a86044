"""Check OUT before anything is written, so that no file of the user is ever harmed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, LlamaMoeError, RefusedError
from .ledger import STATES, partial_path, replaced_path
from .paths import refuse_windows_path
from .reader import INDEX, LICENSE_FILES, SIDE_FILES, read_weight_map

RECIPE_FILE, RECEIPT_FILE = "llamamoe_recipe.yaml", "llamamoe_receipt.json"
HEAL_RECIPE_FILE, HEAL_RECEIPT_FILE = "llamamoe_heal.yaml", "llamamoe_heal.json"
DERIVED_FILE = "llamamoe_derived.json"
TRAINING_RECIPE_FILE, TRAINING_RECEIPT_FILE = "recipe.yaml", "llamamoe_training_receipt.json"
TRAINED = "model"
"""The folder of the trained model in that of a run of ``pretrain``."""
MARKS = (RECIPE_FILE, HEAL_RECIPE_FILE, DERIVED_FILE)
"""Files by which a folder is recognised as written by llamamoe."""
_OURS = {"config.json", INDEX, "README.md", *MARKS, RECEIPT_FILE, HEAL_RECEIPT_FILE, *SIDE_FILES, *LICENSE_FILES}
_MARGIN = 64 * 2**20
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


def normal_path(out: str | Path) -> Path:
    """Return OUT as an absolute path without ``.`` and ``..``; a link at its end is not resolved.

    Raises:
        RefusedError: The path is a Windows path, or not UTF-8, so that libraries could not load the output.
    """
    refuse_windows_path(out)
    path = Path(os.path.abspath(Path(out).expanduser()))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RefusedError(
            f"OUT ({path}) is not UTF-8, and tokenizers opens no file under such a path.", hint="Choose another name."
        ) from None
    return path


@contextmanager
def system_errors(out: Path) -> Iterator[None]:
    """Report system errors during writing as one error for the user."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # making room only helps if the disk is full
        way = (
            "free some space and repeat the command with --resume."
            if full
            else "fix the cause, then continue with --resume."
        )
        raise LlamaMoeError(
            f"writing {partial_path(out)} failed: {what}{error.strerror or error}.",
            hint=f"Finished work is kept: {way}",
        ) from error


def recover_replaced(out: Path) -> None:
    """Finish a replacement of OUT by ``--force`` that a kill interrupted: restore the old one or delete it.

    Raises:
        RefusedError: The name for the old one is taken by something else; nothing was changed.
    """
    old = replaced_path(out)
    if not os.path.lexists(old):
        return
    # a kill during its removal may have left any of its files
    if old.is_symlink() or not old.is_dir() or foreign_names(old):
        raise RefusedError(
            f"{old} is the name for OUT while it is replaced, but it holds something else.",
            hint="Move it away, or choose another OUT.",
        )
    if out.exists():
        shutil.rmtree(old)
    else:
        old.rename(out)


def check_out(out: Path, source: Path, *, force: bool, name: str = "SOURCE") -> None:
    """Refuse an OUT whose writing would harm existing files.

    Args:
        out: The folder to write.
        source: The model that is read.
        force: Whether a checkpoint by llamamoe in OUT may be replaced.
        name: The source's name in messages.

    Raises:
        RefusedError: OUT is inside the source or contains it, is not a folder, or is not empty.
    """
    here = out.resolve()
    check_apart(
        out,
        source,
        name,
        (partial_path(here),) if here.name else (),
        f"; {out.name}.partial beside it is written too",
    )
    if Path.cwd().is_relative_to(here):
        raise RefusedError(f"OUT ({out}) is the current folder.", hint="Choose a folder below or beside it.")
    check_kind(out)
    if out.exists() and any(out.iterdir()):
        _check_replaceable(out, force=force)


def check_apart(out: Path, source: Path, name: str, also: Sequence[Path] = (), note: str = "") -> None:
    """Refuse an OUT that is, contains or is inside a folder that is read, with links and ``..`` resolved.

    Args:
        out: The path to write.
        source: The path that is read.
        name: Its name in the message.
        also: Other paths that are written.
        note: Remark on them for the hint.

    Raises:
        RefusedError: One is inside the other.
    """
    there = source.resolve()
    for place in (out.resolve(), *also):
        if holds(there, place) or holds(place, there):
            raise RefusedError(
                f"OUT ({out}) and {name} ({source}) must not contain each other: files that are read are never changed.",
                hint=f"Choose an OUT elsewhere{note}.",
            )


def holds(folder: Path, path: Path) -> bool:
    """Return whether a path is a folder or inside it, by its name or by its identity on disk.

    A case-insensitive file system, or one that is mounted twice, has several names for one folder.
    """
    if path.is_relative_to(folder):
        return True
    with suppress(OSError):
        return folder.exists() and any(each.exists() and each.samefile(folder) for each in (path, *path.parents))
    return False


def check_kind(out: Path) -> None:
    """Refuse an OUT that exists and is not a folder, or that cannot be created.

    Raises:
        RefusedError: OUT is a file or a symbolic link, or is below a file.
    """
    if not out.exists():
        if out.is_symlink():
            raise RefusedError(f"OUT ({out}) is a broken symbolic link.", hint="Choose another name.")
        parent = next(p for p in out.resolve().parents if p.exists())
        if not parent.is_dir():
            raise RefusedError(f"OUT ({out}) cannot be created: {parent} is not a folder.", hint="Choose another name.")
    elif not out.is_dir() or out.is_symlink():
        kind = "a symbolic link" if out.is_symlink() else "not a folder"
        raise RefusedError(f"OUT ({out}) exists and is {kind}.", hint="Choose another name.")


def _check_replaceable(out: Path, *, force: bool) -> None:
    ours = any((out / mark).is_file() for mark in MARKS)
    if not force:
        way = ", or --force to replace the checkpoint in it" if ours else ": llamamoe did not write what it holds"
        done = "It holds a complete result. " if ours else ""
        raise RefusedError(f"OUT ({out}) is not empty.", hint=f"{done}Choose another name{way}.")
    if not ours:
        raise RefusedError(
            f"OUT ({out}) is not empty and was not written by llamamoe: --force does not remove it.",
            hint="Choose another name.",
        )
    foreign = foreign_names(out)
    if foreign:
        raise RefusedError(
            f"OUT ({out}) also holds {foreign[0]!r}, which llamamoe did not write: --force does not remove it.",
            hint="Move it away, or choose another name.",
        )


def foreign_names(folder: Path, also: Collection[str] = ()) -> list[str]:
    """Return the names in a folder that no checkpoint by llamamoe has, sorted.

    Args:
        folder: An OUT, or the folder in which it is assembled.
        also: Further permitted names; only `STATES` may be a folder.
    """
    known = {*_OURS, *also}
    with suppress(CheckpointError):  # merge and retop keep their source's file names
        known.update(read_weight_map(folder / INDEX).values())
    return sorted(
        path.name
        for path in folder.iterdir()
        if not (path.is_file() or path.name == STATES) or not (path.name in known or _WEIGHTS.fullmatch(path.name))
    )


def free_bytes(out: Path, *, resume: bool) -> int:
    """Return the free space on the disk of OUT, including files of a stopped run that ``resume`` reuses."""
    have = shutil.disk_usage(next(p for p in out.resolve().parents if p.exists())).free
    if resume and partial_path(out).is_dir():
        have += sum(p.stat().st_blocks * 512 for p in partial_path(out).iterdir() if p.is_file())
    return have


def check_room(
    out: Path, nbytes: int, *, reuse: bool, what: str = "the result takes", less: Sequence[str] = ()
) -> None:
    """Refuse if the disk of OUT cannot hold what is to be written.

    Args:
        out: The folder or file to write.
        nbytes: Its bytes; small files beside them get a margin.
        reuse: Whether files of a stopped run are continued or discarded, so that their space counts as free.
        what: Subject and verb of the message.
        less: Ways to need less, for the hint.

    Raises:
        RefusedError: Too few bytes are free.
    """
    have, need = free_bytes(out, resume=reuse), nbytes + _MARGIN
    if have < need:
        *ways, last = ("Free some space", "choose another disk", *less)
        raise RefusedError(
            f"{what} {need / 1e9:.2f} GB, but the disk of {out} has {have / 1e9:.2f} GB free.",
            hint=f"{', '.join(ways)}, or {last}.",
        )
