"""Provide a folder for large temporary files, which are also removed after a process was killed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from ..errors import RefusedError
from .files import InUseError, lock, open_update

_PREFIX = "llamamoe-scratch-"
_LOCK = ".llamamoe-scratch"
"""Lock file in the folder, held while the folder is in use; a folder without it is never deleted."""


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder that is deleted afterwards; delete those that killed processes of this user left beside it.

    Args:
        parent: Parent folder; None: the system's folder of temporary files.

    Raises:
        OSError: The folder cannot be created.
    """
    parent = Path(gettempdir()) if parent is None else parent
    _remove_left(parent)
    with TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        folder = Path(name)
        unlocked = folder / f"{_LOCK}.new"
        with open_update(unlocked) as file:
            lock(file)
            unlocked.rename(folder / _LOCK)  # under this name it is never visible unlocked while this process lives
            yield folder


def _remove_left(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError, InUseError, RefusedError):
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and (folder / _LOCK).is_file():
                with open_update(folder / _LOCK) as file:
                    lock(file)
                    shutil.rmtree(folder)
