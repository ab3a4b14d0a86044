"""The record of what a stopped run finished, in the folder in which OUT is put together.

The first line names what is being written; then one line a unit, with the hashes of its tensors, each appended only
after the tensors are on disk. The file is locked while a process works in the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from .files import InUseError, check_plain, is_locked, lock, open_append, remove_temporaries

LEDGER = ".ledger.jsonl"
_SEAL = "line_sha256"
"""The key of a line under which the hash of all else in it stands."""
STATES = ".calibration"
"""A folder in which a calibrated run keeps what it goes on from; nothing of it is published."""


def partial_path(out: Path) -> Path:
    """The folder in which ``out`` is put together."""
    return out.with_name(out.name + ".partial")


def replaced_path(out: Path) -> Path:
    """Where the old ``out`` waits while a new one takes its place."""
    return out.with_name(f".{out.name}.llamamoe-replaced")


class Ledger:
    """The ledger of ``OUT.partial/``, opened and locked; makes the folder.

    Args:
        folder: ``OUT.partial/``.
        fingerprint: Identifies what is written; a resume with another one is refused.
        resume: Go on with what the folder holds, if it exists.
        restart: Throw away what the folder holds.
        foreign: Names what in the folder a run did not write, which is not thrown away; None if all of it is ours.

    Attributes:
        units: Finished units: name to the line that `append` wrote.

    Raises:
        RefusedError: The folder exists without ``resume`` or ``restart``, belongs to something else, also holds something
            else, or is in use.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        *,
        resume: bool,
        restart: bool,
        foreign: Callable[[Path], list[str]] | None = None,
    ) -> None:
        self.folder = folder
        self._foreign = foreign
        if folder.exists() and not (resume or restart):
            if is_locked(folder / LEDGER):
                raise in_use(folder)
            raise RefusedError(
                f"{folder} is left from a run that was stopped.",
                hint="--resume finishes it; --force starts again.",
            )
        if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
            raise RefusedError(
                f"{folder} is where OUT is put together, but it holds something else.",
                hint="Choose another OUT, or move it away.",
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._file = io.TextIOWrapper(open_append(folder / LEDGER), encoding="utf-8", errors="surrogateescape")
        try:
            self._lock()
            self._begin(fingerprint, restart)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            lock(self._file)
        except InUseError:
            raise in_use(self.folder) from None

    def _begin(self, fingerprint: str, restart: bool) -> None:
        if not restart:
            check_plain(self.folder)
        remove_temporaries(self.folder)
        lines = [] if restart else self._read()
        if not lines:  # also where the ledger is gone: what lies there is of unknown origin
            self._clear()
            self.append({"fingerprint": fingerprint})
        elif lines[0]["fingerprint"] != fingerprint:
            raise RefusedError(
                f"{self.folder} was begun from another source, recipe, version or number of threads, so it cannot be "
                "finished with this one.",
                hint="Repeat the first command with --resume, or start again with --force.",
            )
        self.units: dict[str, dict[str, Any]] = {line["unit"]: line for line in lines[1:]}

    def _clear(self) -> None:
        foreign = self._foreign(self.folder) if self._foreign else []
        if foreign:
            raise RefusedError(
                f"{self.folder} also holds {foreign[0]!r}, which is not llamamoe's: nothing was removed.",
                hint="Move it away, or choose another OUT.",
            )
        self._file.truncate(0)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LEDGER:
                path.unlink()

    def _read(self) -> list[dict[str, Any]]:
        """The complete lines; half a line, left by a kill, is cut off so that the next one starts clean."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = [_unsealed(json.loads(line)) for line in whole.split("\n")[:-1]]
            _check(lines)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise RefusedError(f"the ledger in {self.folder} is damaged.", hint="Start again with --force.") from None
        self._file.truncate(len(whole.encode(errors="surrogateescape")))
        return lines

    def append(self, line: dict[str, Any]) -> None:
        """Add a line and wait until it is on disk."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line | {_SEAL: _seal(line)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which also gives up the lock."""
        self._file.close()


def in_use(folder: Path) -> RefusedError:
    """Return the refusal of a folder that another process writes."""
    return RefusedError(f"another process is writing {folder}.", hint="Wait for it, or choose another OUT.")


def _seal(line: dict[str, Any]) -> str:
    """Return a hash of a line: what readers make of it relies on every value in it."""
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()[:16]


def _unsealed(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line without its hash.

    Raises:
        ValueError: The line was changed.
    """
    if line.pop(_SEAL) != _seal(line):
        raise ValueError("not the line that was written")
    return line


def _check(lines: list[dict[str, Any]]) -> None:
    if lines and not isinstance(lines[0]["fingerprint"], str):
        raise ValueError("no fingerprint")
    for line in lines[1:]:
        if not (isinstance(line["unit"], str) and isinstance(line["info"], dict)):
            raise ValueError("no unit")
        if not all(isinstance(digest, str) for digest in line["sha256"].values()):
            raise ValueError("no hashes")


def _is_ours(path: Path) -> bool:
    """Whether a folder is one that a run left: it has a ledger, or (stopped at its very start or end) needs none."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    finished = ({"llamamoe_recipe.yaml", "llamamoe_receipt.json"}, {"llamamoe_derived.json"})
    return LEDGER in names or not names or any({"config.json", *each} <= names for each in finished)


def run_facts(started: float) -> dict[str, Any]:
    """What differs from run to run: when, how long, how much memory, on what."""
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - started, 3),
        "peak_resident_bytes": peak_resident_bytes(),
        "platform": platform.platform(),
    }


def peak_resident_bytes() -> int:
    """Most resident memory of this process since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
