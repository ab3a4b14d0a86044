"""What is checked about OUT before anything is written, so that nothing of the user's is ever harmed."""

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
from .reader import INDEX, LICENSE_FILES, SIDE_FILES, read_weight_map

RECIPE_FILE, RECEIPT_FILE = "llamamoe_recipe.yaml", "llamamoe_receipt.json"
HEAL_RECIPE_FILE, HEAL_RECEIPT_FILE = "llamamoe_heal.yaml", "llamamoe_heal.json"
DERIVED_FILE = "llamamoe_derived.json"
MARKS = (RECIPE_FILE, HEAL_RECIPE_FILE, DERIVED_FILE)
"""One of these files says that llamamoe wrote a folder."""
_OURS = {"config.json", INDEX, "README.md", *MARKS, RECEIPT_FILE, HEAL_RECEIPT_FILE, *SIDE_FILES, *LICENSE_FILES}
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


def normal_path(out: str | Path) -> Path:
    """OUT as an absolute path without ``.`` and ``..``; a link at its end is kept as it is.

    Raises:
        RefusedError: It is not UTF-8: libraries that are to load what is written could not open it.
    """
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
    """Errors of the system, while something is written, as one for the user."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # only a full disk is mended by making room
        way = "make room and repeat the command with --resume." if full else "mend the cause, then --resume goes on."
        raise LlamaMoeError(
            f"writing {partial_path(out)} failed: {what}{error.strerror or error}.",
            hint=f"What was finished is kept: {way}",
        ) from error


def recover_replaced(out: Path) -> None:
    """Finish what a kill interrupted while ``--force`` replaced OUT: the old one comes back, or goes for good.

    Raises:
        RefusedError: Something else has the name under which the old one waits; nothing was changed.
    """
    old = replaced_path(out)
    if not os.path.lexists(old):
        return
    # a kill while it was removed may have left any of its files
    if old.is_symlink() or not old.is_dir() or foreign_names(old):
        raise RefusedError(
            f"{old} is where an OUT waits while it is replaced, but it holds something else.",
            hint="Move it away, or choose another OUT.",
        )
    if out.exists():
        shutil.rmtree(old)
    else:
        old.rename(out)


def check_out(out: Path, source: Path, *, force: bool) -> None:
    """Refuse an OUT that would harm something.

    Raises:
        RefusedError: It lies in the source or the other way round, is no folder, or holds something.
    """
    here = out.resolve()
    check_apart(
        out,
        source,
        "SOURCE",
        (partial_path(here),) if here.name else (),
        f"; {out.name}.partial beside it is written too",
    )
    if Path.cwd().is_relative_to(here):
        raise RefusedError(f"OUT ({out}) is the folder that you are in.", hint="Choose a folder below or beside it.")
    check_kind(out)
    if out.exists() and any(out.iterdir()):
        _check_replaceable(out, force=force)


def check_apart(out: Path, source: Path, name: str, also: Sequence[Path] = (), note: str = "") -> None:
    """Refuse an OUT that lies in what is read, holds it, or is it, links and ``..`` followed.

    Args:
        out: Where something is to be written.
        source: What is read.
        name: What that is, for the message.
        also: Other places that are written.
        note: What the hint says of them.

    Raises:
        RefusedError: One lies in the other.
    """
    there = source.resolve()
    for place in (out.resolve(), *also):
        if holds(there, place) or holds(place, there):
            raise RefusedError(
                f"OUT ({out}) and {name} ({source}) must not lie in one another: what is read is never touched.",
                hint=f"Choose an OUT elsewhere{note}.",
            )


def holds(folder: Path, path: Path) -> bool:
    """Return whether a path is a folder or lies in it: by its name, or by what is there.

    A file system that takes capitals for small letters, or is mounted twice, has several names for one folder.
    """
    if path.is_relative_to(folder):
        return True
    with suppress(OSError):
        return folder.exists() and any(each.exists() and each.samefile(folder) for each in (path, *path.parents))
    return False


def check_kind(out: Path) -> None:
    """Refuse an OUT that is there and is not a folder, or that cannot be made.

    Raises:
        RefusedError: It is a file or a symbolic link, or lies below a file.
    """
    if not out.exists():
        if out.is_symlink():
            raise RefusedError(f"OUT ({out}) is a broken symbolic link.", hint="Choose another name.")
        parent = next(p for p in out.resolve().parents if p.exists())
        if not parent.is_dir():
            raise RefusedError(f"OUT ({out}) cannot be made: {parent} is not a folder.", hint="Choose another name.")
    elif not out.is_dir() or out.is_symlink():
        kind = "a symbolic link" if out.is_symlink() else "not a folder"
        raise RefusedError(f"OUT ({out}) exists and is {kind}.", hint="Choose another name.")


def _check_replaceable(out: Path, *, force: bool) -> None:
    if not force:
        raise RefusedError(
            f"OUT ({out}) is not empty.", hint="Choose another name, or --force to replace the checkpoint in it."
        )
    if not any((out / mark).is_file() for mark in MARKS):
        raise RefusedError(
            f"OUT ({out}) is not empty and was not written by llamamoe: --force does not remove it.",
            hint="Choose another name.",
        )
    foreign = foreign_names(out)
    if foreign:
        raise RefusedError(
            f"OUT ({out}) also holds {foreign[0]!r}, which is not llamamoe's: --force does not remove it.",
            hint="Move it away, or choose another name.",
        )


def foreign_names(folder: Path, also: Collection[str] = ()) -> list[str]:
    """Names in a folder that no checkpoint of ours has, sorted.

    Args:
        folder: An OUT, or the folder in which it is put together.
        also: Further names of ours; only that of `STATES` may be a folder's.
    """
    known = {*_OURS, *also}
    with suppress(CheckpointError):  # merge and retop keep the names of their source's files
        known.update(read_weight_map(folder / INDEX).values())
    return sorted(
        path.name
        for path in folder.iterdir()
        if not (path.is_file() or path.name == STATES) or not (path.name in known or _WEIGHTS.fullmatch(path.name))
    )


def free_bytes(out: Path, *, resume: bool) -> int:
    """What the disk of OUT has room for; what a stopped run left there, and ``resume`` takes up, counts as free."""
    have = shutil.disk_usage(next(p for p in out.resolve().parents if p.exists())).free
    if resume and partial_path(out).is_dir():
        have += sum(p.stat().st_blocks * 512 for p in partial_path(out).iterdir() if p.is_file())
    return have
