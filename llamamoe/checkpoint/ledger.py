"""The record of finished work from which a stopped run resumes, in the folder in which OUT is assembled.

The first line identifies what is being written; then one line per unit, with the hashes of its tensors, each appended
only after the tensors are on disk. The file is locked while a process works in the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RefusedError
from .files import InUseError, check_plain, is_locked, lock, open_append, remove_temporaries

LEDGER = ".ledger.jsonl"
_SHORT = 32
"""Longest text that a fingerprint keeps as it is; a hash is longer."""
_SEAL = "line_sha256"
"""The key of a line that holds the hash of the rest of it."""
STATES = ".calibration"
"""Name of the folder for a calibrated run's state, from which it resumes; never published."""


def partial_path(out: Path) -> Path:
    """Return the folder in which ``out`` is assembled."""
    return out.with_name(out.name + ".partial")


def remove_states(folder: Path) -> None:
    """Delete a calibrated run's state in ``OUT.partial/``."""
    shutil.rmtree(folder / STATES, ignore_errors=True)


def replaced_path(out: Path) -> Path:
    """Return the path to which the old ``out`` is moved while a new one replaces it."""
    return out.with_name(f".{out.name}.llamamoe-replaced")


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Return a fingerprint for `Ledger` whose parts are compared by name, so that a refusal names what differs.

    Args:
        parts: JSON-compatible data by what it is, such as "number of threads"; numbers and short texts are kept, others hashed.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, int) or (isinstance(value, str) and len(value) <= _SHORT):
            return value
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    return json.dumps({name: kept(value) for name, value in parts.items()})


def _differing(one: str, other: str) -> str:
    """Return words for the parts in which two fingerprints differ."""
    try:
        before, now = json.loads(one), json.loads(other)
        assert before.keys() == now.keys()
    except (ValueError, AttributeError, AssertionError):
        return "another source, recipe, version or number of threads"
    words = []
    for name in (name for name in now if before[name] != now[name]):
        told = max(len(str(value)) for value in (before[name], now[name])) <= _SHORT
        words.append(f"another {name}" + (f" ({before[name]}, now {now[name]})" if told else ""))
    return " and ".join(words)


class Ledger:
    """The open and locked ledger of ``OUT.partial/``; creates the folder.

    Args:
        folder: ``OUT.partial/``.
        fingerprint: Identifies the output; a resume with a different one is refused.
        resume: Resume from the content of the folder, if it exists.
        restart: Discard the content of the folder.
        foreign: Lists entries of the folder that no run wrote, which are not deleted; None if llamamoe wrote them all.

    Attributes:
        units: Finished units by name, as `append` wrote them.
        seconds_before: Seconds that interrupted runs worked, up to the last unit that they finished.

    Raises:
        RefusedError: The folder exists without ``resume`` or ``restart``, belongs to another output, contains something
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
        self.seconds_before = 0.0
        self._opened = time.monotonic()
        self._foreign = foreign
        check_left(folder, resume=resume, restart=restart)
        if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
            raise RefusedError(
                f"{folder} is needed to assemble OUT, but it holds something else.",
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
        if not lines:  # also if the ledger is missing: the content is then of unknown origin
            self._clear()
            self.append({"fingerprint": fingerprint})
        elif lines[0]["fingerprint"] != fingerprint:
            raise RefusedError(
                f"{self.folder} was started with {_differing(lines[0]['fingerprint'], fingerprint)}, so it cannot be finished now: the "
                "result would be neither of both.",
                hint="Repeat the first command with --resume, or start again with --force.",
            )
        self.seconds_before = max((line.pop("seconds", 0.0) for line in lines[1:]), default=0.0)
        self.units: dict[str, dict[str, Any]] = {line["unit"]: line for line in lines[1:]}

    def _clear(self) -> None:
        foreign = self._foreign(self.folder) if self._foreign else []
        if foreign:
            raise RefusedError(
                f"{self.folder} also holds {foreign[0]!r}, which llamamoe did not write: nothing was removed.",
                hint="Move it away, or choose another OUT.",
            )
        self._file.truncate(0)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LEDGER:
                path.unlink()

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete lines; a partial line left by a kill is removed so that the next one starts cleanly."""
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
        """Add a line, with the seconds of all runs until now, and wait until it is on disk."""
        line = line | {"seconds": round(self.seconds_before + time.monotonic() - self._opened, 6)}
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line | {_SEAL: _seal(line)}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which also releases the lock."""
        self._file.close()


def check_left(folder: Path, *, resume: bool, restart: bool) -> None:
    """Refuse a new run while the work of a stopped or running one is in the folder in which OUT is assembled.

    `Ledger` checks it, too; a command calls this first, so that the user does not wait for a refusal.

    Args:
        folder: ``OUT.partial/``.
        resume: The run finishes the work in it.
        restart: The run discards the work in it.

    Raises:
        RefusedError: The work of another run is in it, and neither ``resume`` nor ``restart`` is given.
    """
    if not (resume or restart) and _is_ours(folder):
        if is_locked(folder / LEDGER):
            raise in_use(folder)
        raise RefusedError(
            f"{folder} is left from a run that was stopped.", hint="--resume finishes it; --force starts again."
        )


def refuse_unfinished(path: Path) -> None:
    """Refuse to read a folder in which a run assembles its output, or did until it was stopped.

    Raises:
        CheckpointError: The folder holds a ledger; the message says how to finish or remove it.
    """
    if not (path / LEDGER).is_file():
        return
    if is_locked(path / LEDGER):
        raise CheckpointError(
            f"{path} is being written by another process, which renames it when it is finished.", hint="Wait for it."
        )
    raise CheckpointError(
        f"{path} is the unfinished output of a run that was stopped.",
        hint="Repeat the command that wrote it: --resume finishes it, --force starts again. Nothing else needs the folder, so it can "
        "be removed.",
    )


def in_use(folder: Path) -> RefusedError:
    """Return the refusal of a folder that another process writes."""
    return RefusedError(f"another process is writing {folder}.", hint="Wait for it, or choose another OUT.")


def _seal(line: dict[str, Any]) -> str:
    """Return a hash of a line, because readers rely on every value in it."""
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
        if not 0 <= line.get("seconds", 0.0) < math.inf:
            raise ValueError("no time")


def _is_ours(path: Path) -> bool:
    """Return whether a run left a folder: it has a ledger, or (stopped at its very start or end) needs none."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    finished = ({"llamamoe_recipe.yaml", "llamamoe_receipt.json"}, {"llamamoe_derived.json"}, {"llamamoe_heal.json"})
    return LEDGER in names or not names or any({"config.json", *each} <= names for each in finished)


def run_facts(started: float) -> dict[str, Any]:
    """Return facts that differ between runs: time, duration, memory and machine."""
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - started, 3),
        "peak_resident_bytes": peak_resident_bytes(),
        "platform": platform.platform(),
    }


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
