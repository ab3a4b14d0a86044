"""Read the files of a source without mapping them, and detect changes meanwhile.

A mapped file that another process truncates kills the reader with SIGBUS; a short read is an error that can be
reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from ..errors import LlamaMoeError
from ..lazy import np
from .memory import empty_bytes

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size, time of the last change of the content and of the attributes, the last two in nanoseconds."""
_AT_ONCE = 2**30
"""Bytes per read: Linux returns at most 2 GiB."""


class SourceFiles:
    """Watched files: their state when first seen, and their bytes."""

    def __init__(self) -> None:
        self._stamps: dict[Path, Stamp | None] = {}
        self._open: dict[Path, IO[bytes]] = {}

    def watch(self, *paths: Path) -> None:
        """Record the state of files, including missing ones; the state of files seen before is kept."""
        for path in paths:
            self._stamps.setdefault(path, _stamp(path))

    def facts(self, paths: Iterable[Path]) -> list[list[Any]]:
        """Return name, size and time of change in nanoseconds of watched files, as they were when first seen."""
        stamps = ((path, self._stamps[path]) for path in sorted(paths))
        return [[path.name, stamp[2], stamp[3]] for path, stamp in stamps if stamp is not None]

    def read(self, path: Path, offset: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return bytes of a watched file, uint8 ``[nbytes]``, in memory owned by the caller.

        Raises:
            LlamaMoeError: The file has changed since it was first seen, or cannot be read.
        """
        out = empty_bytes(nbytes)
        view, done = memoryview(out), 0  # type: ignore[arg-type]
        try:
            handle = self._handle(path)
            while done < nbytes:
                count = os.preadv(handle.fileno(), [view[done : done + _AT_ONCE]], offset + done)
                if count == 0:
                    raise _changed(path, f"it ends at byte {offset + done:,}, within a tensor")
                done += count
        except OSError as error:
            raise LlamaMoeError(f"{path} cannot be read: {error.strerror}.") from error
        return out

    def check_unchanged(self) -> None:
        """Check that no watched file has changed since it was first seen.

        Raises:
            LlamaMoeError: A file was written, replaced, removed or added since.
        """
        for path, before in self._stamps.items():
            how = _difference(before, _stamp(path))
            if how:
                raise _changed(path, how)

    def _handle(self, path: Path) -> IO[bytes]:
        if path not in self._open:
            handle = path.open("rb", buffering=0)
            how = _difference(self._stamps[path], _of(os.fstat(handle.fileno())))
            if how:
                handle.close()
                raise _changed(path, how)
            self._open[path] = handle
        return self._open[path]


def _stamp(path: Path) -> Stamp | None:
    try:
        return _of(path.stat())
    except OSError:
        return None


def _of(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _difference(before: Stamp | None, now: Stamp | None) -> str | None:
    """Describe the change of a file; None if there is none."""
    if before == now:
        return None
    if now is None:
        return "it is missing now"
    if before is None:
        return "it was not there before"
    if before[:2] != now[:2]:
        return "it was replaced by another file"
    if before[2] != now[2]:
        return f"it had {before[2]:,} bytes and has {now[2]:,} now"
    return "it was written to" if before[3] != now[3] else "its attributes were changed"


def _changed(path: Path, how: str) -> LlamaMoeError:
    return LlamaMoeError(
        f"{path} changed while it was read ({how}), so the result would be a mixture of two models.",
        hint="Wait until no process writes to it and start again; its conversion was not published and needs --force.",
    )
