"""Open files for writing; no other module does.

A folder given by the user may hold links to files elsewhere, under any name. They are never written through: files
that are replaced are written under a random name that did not exist and renamed, and files that are opened again must
be plain files with one name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from ..errors import RefusedError
from ..lazy import safetensors, torch

_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # refuses links, does not block on a pipe
_MODE = 0o666  # minus the umask, as for files that `open` creates
_TEMPORARY = re.compile(r"\.llamamoe-[0-9a-f]{16}\.tmp")
_COPY_BYTES = 2**20


class InUseError(Exception):
    """Another process holds a lock."""


_UNSYNCED = ContextVar("unsynced", default=False)


@contextmanager
def unsynced() -> Iterator[None]:
    """Skip syncing to disk while temporary files are written."""
    before = _UNSYNCED.set(True)
    try:
        yield
    finally:
        _UNSYNCED.reset(before)


# ---- whole files ---------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all; see `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, whole or not at all; see `replacing`."""
    with source.open("rb") as read, replacing(target) as file:
        shutil.copyfileobj(read, file, _COPY_BYTES)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; see `replacing`."""
    with replacing_path(path) as temporary:
        safetensors.torch.save_file(dict(tensors), temporary, metadata)


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file that takes the name ``path`` when the block ends without an error.

    Until then it is beside ``path`` under a random name; after an error nothing is left. An existing entry of that name
    is replaced; for a link, the link itself, never its target.

    Args:
        path: The name that the file gets.
        sync: Whether to wait until file and name are on disk.

    Raises:
        OSError: The file cannot be created, written or renamed; ``filename`` is ``path``.
    """
    with (
        replacing_path(path, sync=sync) as temporary,
        os.fdopen(os.open(temporary, os.O_WRONLY | _SAFE), "wb") as file,
    ):
        yield file


@contextmanager
def replacing_path(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Create an empty file for a library that writes by name; otherwise like `replacing`."""
    sync = sync and not _UNSYNCED.get()
    temporary = path.with_name(f".llamamoe-{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _SAFE, _MODE))
        yield temporary
        if sync:
            sync_path(temporary)
        os.replace(temporary, path)
        if sync:
            sync_path(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is not None and Path(error.filename) == temporary:
            raise OSError(error.errno, error.strerror, str(path)) from error  # the random name would not help the user
        raise


def remove_temporaries(folder: Path) -> None:
    """Delete files that a killed `replacing` left in a folder, which must be locked."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


# ---- files that grow or are filled in place ------------------------------------------------------------------------


def open_update(path: Path) -> IO[bytes]:
    """Open a file for reading and writing in place, unbuffered; an empty one is created if missing.

    Raises:
        RefusedError: The path is a link, has a second name, or is not a plain file.
        OSError: The file cannot be opened.
    """
    return _opened(path, 0, buffering=0)


def open_append(path: Path) -> IO[bytes]:
    """Open a file for appending; an empty one is created if missing.

    Raises:
        RefusedError: The path is a link, has a second name, or is not a plain file.
        OSError: The file cannot be opened.
    """
    return _opened(path, os.O_APPEND, buffering=-1)


def set_size(path: Path, nbytes: int) -> None:
    """Set the size of a file for a library that maps it by name; a file of another size loses its contents.

    Raises:
        RefusedError: The path is a link, has a second name, or is not a plain file.
        OSError: The file cannot be opened, or the disk is full.
    """
    with open_update(path) as file:
        if os.fstat(file.fileno()).st_size != nbytes:
            file.truncate(0)
            file.truncate(nbytes)


def _opened(path: Path, flags: int, *, buffering: int) -> IO[bytes]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | flags | _SAFE, _MODE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_plain(path) from None
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(handle)
        raise _not_plain(path)
    return os.fdopen(handle, "r+b", buffering=buffering)


def _not_plain(path: Path) -> RefusedError:
    return RefusedError(
        f"{path} is {_kind(path)}: llamamoe writes only to plain files that it created.",
        hint="Remove it, or choose another folder.",
    )


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISREG(mode):
        return "a hard link to a file with another name"
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def make_folder(path: Path) -> None:
    """Create a folder inside one given by the user, unless it exists.

    Raises:
        RefusedError: The name is a link to a folder elsewhere.
        OSError: The folder cannot be created.
    """
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise _not_plain(path)


def check_plain_file(path: Path) -> None:
    """Refuse a path that exists and is not a plain file with one name.

    Raises:
        RefusedError: The path is a link, a folder, a pipe, or has a second name.
    """
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise _not_plain(path)


def check_plain(folder: Path) -> None:
    """Refuse a folder that contains anything but plain files and folders, such as a link.

    Called before a library writes into a folder by name.

    Raises:
        RefusedError: There is such an entry; the message names the first.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if not stat.S_ISDIR(path.lstat().st_mode):
                check_plain_file(path)


# ---- locks and the disk --------------------------------------------------------------------------------------------


def lock(file: IO[bytes] | IO[str]) -> None:
    """Take the lock of an open file; it is released when the file is closed or the process ends.

    Raises:
        InUseError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError from None


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock of a file, without taking it."""
    try:
        with os.fdopen(os.open(path, os.O_RDWR | _SAFE), "rb") as file:
            lock(file)
    except InUseError:
        return True
    except OSError:
        return False
    return False


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY | _SAFE)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
