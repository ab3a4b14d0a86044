"""Turn unexpected errors of the operating system into one line with a hint."""

from __future__ import annotations

import errno
import os
import re

from llamamoe.errors import LlamaMoeError

_FULL = "Free some space, or choose another disk; if OUT.partial was kept, --resume continues."
_MEMORY = "Close other programs, or choose a smaller model, batch or dtype."
_FILES = "Raise the limit of open files, for example: ulimit -n 65536"
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Change the permissions, or choose another folder."),
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.ENOMEM: _MEMORY,
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    errno.EAGAIN: "Raise the limit of processes (ulimit -u), or start fewer.",
    errno.EFBIG: "The file system or ulimit -f does not allow a file this large: choose another folder or raise the limit.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
_NUMBERED = re.compile(r"\(os error (\d+)\)")
"""The form in which libraries written in Rust report an error of the system."""
_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "bad allocation", "bad_alloc")


def told(error: Exception, *, verbose: bool) -> LlamaMoeError:
    """Return an error for the user; only one that is not the system's refers to the traceback."""
    found = _of_the_system(error)
    if found is not None:
        return found
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return LlamaMoeError(text, hint=None if verbose else "Use -v for the traceback.")


def _of_the_system(error: Exception) -> LlamaMoeError | None:
    """The error, if it says what the machine lacks: room, rights, memory, or a limit."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _is_memory(error):
        first = text.strip().splitlines()
        return LlamaMoeError(f"there is not enough memory{': ' + first[0] if first else ''}.", hint=_MEMORY)
    if isinstance(error, RecursionError):
        return LlamaMoeError(
            "an input file is nested too deeply.", hint="Check the JSON and YAML files that were given."
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return LlamaMoeError("no further thread can be started.", hint=_HINTS[errno.EAGAIN])
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return LlamaMoeError(f"{where}{error.strerror}.", hint=_HINTS.get(error.errno or 0))
    number = _NUMBERED.search(text)
    if number is not None:
        return LlamaMoeError(
            f"{os.strerror(int(number[1]))} ({type(error).__name__}).", hint=_HINTS.get(int(number[1]))
        )
    return None


def _is_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _ALLOCATORS)
