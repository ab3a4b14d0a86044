"""Decide which files of a folder may be read: plain names, and no link that leads out of the folder.

An untrusted folder could otherwise name any file of its reader. Links into a hub cache's own blobs
are followed, and into folders that the user has listed in ``LLAMAMOE_LINKS_INTO``.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError, RefusedError, UsageError, printable

BACKSLASHES = "On this system folders are separated by /, not by \\; in WSL, C:\\models\\x is /mnt/c/models/x."
"""Hint for a Windows path, which would be a single name on other systems."""
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|[^/\\]*\\[^/]*$")
"""A drive letter, or backslashes as the only separators."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""Maximum size of a pointer by its specification."""


def refuse_windows_path(path: str | Path, name: str = "OUT") -> None:
    """Refuse a place to write that is a Windows path: on other systems it would become one file or folder of that name.

    Args:
        path: As the user gave it.
        name: Its name in the message.

    Raises:
        RefusedError: It begins with a drive letter, or backslashes are its only separators.
    """
    if os.sep == "/" and _WINDOWS.match(str(path)):
        raise RefusedError(f"{name} ({path}) is a Windows path.", hint=BACKSLASHES)


def windows_hint(path: str | Path) -> str:
    """Return the beginning of a hint for a path that does not exist: how to write a Windows path, if it may be one."""
    return f"{BACKSLASHES} " if _WINDOWS.match(str(path)) or "\\" in str(path) else ""


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that is a Git LFS pointer to the real one.

    Args:
        path: The file, for the message.
        start: Its first bytes.

    Raises:
        CheckpointError: The file is such a pointer.
    """
    if start.startswith(_POINTER):
        raise CheckpointError(
            f"{path.name} is a Git LFS pointer, not the file itself.",
            hint=f"Fetch the files: cd {path.parent} && git lfs pull",
        )


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse files that are Git LFS pointers to the real ones; missing files are ignored.

    Raises:
        CheckpointError: A file is such a pointer; see `refuse_pointer`.
    """
    for path in paths:
        start = b""
        with suppress(OSError):  # the reader of the file reports the error
            if path.is_file() and path.stat().st_size < _POINTER_BYTES:
                with path.open("rb") as file:
                    start = file.read(len(_POINTER))
        refuse_pointer(path, start)


LINKS_INTO = "LLAMAMOE_LINKS_INTO"
"""Environment variable with the folders that links in a source may lead into, separated as in ``PATH``."""


def inside(folder: Path, name: str) -> Path:
    """Return the path of file ``name`` in a folder; see the module's docstring for permitted links.

    Raises:
        CheckpointError: The name is not a plain file name, the file is missing, or it is a link out of the folder.
    """
    path = folder / name
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise CheckpointError(f"the index names {name!r}, which is not a plain file name in the folder: refused.")
    if not check_link(path, folder).is_file():
        raise CheckpointError(f"{name} is missing from {folder}.", hint="Download the checkpoint again.")
    return path


def check_link(path: Path, folder: Path) -> Path:
    """Return the resolved path of a file in a folder.

    Args:
        path: The file, or a link to it.
        folder: The folder that it must stay in.

    Raises:
        CheckpointError: The path is a link out of the folder and not into a permitted one, or to another user's file.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path.name} cannot be found ({error}).", hint="Copy the file into the folder."
        ) from None
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if any(real.is_relative_to(allowed) for allowed in roots):
        return real
    listed = [Path(entry).expanduser().resolve() for entry in os.environ.get(LINKS_INTO, "").split(os.pathsep) if entry]
    if not any(real.is_relative_to(allowed) for allowed in listed):
        raise CheckpointError(
            f"{path.name} is a symbolic link out of the folder (to {printable(str(real))}): refused.",
            hint=f"Copy the file into the folder, or, if you trust the folder, permit it: {LINKS_INTO}={real.parent}",
        )
    if real.exists() and real.stat().st_uid != os.getuid():
        raise CheckpointError(
            f"{path.name} is a symbolic link to another user's file ({printable(str(real))}): refused, although {LINKS_INTO} "
            "permits its folder.",
            hint="Copy the file into the folder.",
        )
    return real


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> None:
    """Refuse anything but a regular file or a link to one: a pipe has no size and may never end.

    Raises:
        UsageError: The path is anything else.
        CheckpointError: The file is a Git LFS pointer.
        OSError: The file does not exist.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise UsageError(f"'{path}' is {kind}, not a regular file.", hint="Write the text into a file first.")
    refuse_pointers([path])
