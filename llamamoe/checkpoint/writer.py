"""Writes a checkpoint that appears whole or not at all, tensor by tensor, and goes on where it was stopped.

Everything is written into ``OUT.partial/``. The layout of every shard is known before the first byte, so tensors
may come in any order and none is gathered. After each unit (a layer) the data are synced and a line with the hashes
of its tensors is added to a ledger; ``resume`` checks those hashes and skips the units that hold. `publish` renames
the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import LlamaMoeError, RefusedError

if TYPE_CHECKING:
    import torch

LEDGER = ".ledger.jsonl"
QUEUE_BYTES = 256 * 2**20
"""Bytes that may wait for the disk; bounds the memory of the writer."""
BLOCK_BYTES = 2**20
"""Bytes hashed and written at a time: still in the cache for the second; larger writes were several times slower."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: file name, byte offset in the file, bytes."""

    file: str
    offset: int
    nbytes: int


def shard_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, dict[str, int]]:
    """Header of a shard and the offset of each tensor in the file.

    Args:
        tensors: name to (dtype, shape, bytes), in the order in which they lie in the file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, starts = 0, {}
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        starts[name] = offset
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def partial_path(out: Path) -> Path:
    """The folder in which ``out`` is put together."""
    return out.with_name(out.name + ".partial")


class CheckpointWriter:
    """Writes the shards of one checkpoint into ``OUT.partial/``. Use as a context manager.

    Args:
        out: The folder to appear; see `check_out` for what may stand there.
        shards: file name to (tensor name to (dtype, shape, bytes)), in file order.
        fingerprint: Identifies what is written; a resume with another one is refused.
        resume: Go on with what ``OUT.partial/`` holds, if it exists.
        restart: Throw away what ``OUT.partial/`` holds.

    Raises:
        RefusedError: ``OUT.partial/`` exists without ``resume`` or ``restart``, belongs to something else, or is in use.
    """

    def __init__(
        self,
        out: Path,
        shards: Mapping[str, Mapping[str, tuple[str, tuple[int, ...], int]]],
        *,
        fingerprint: str,
        resume: bool = False,
        restart: bool = False,
    ) -> None:
        self.out = out
        self.path = partial_path(out)
        self._fingerprint = fingerprint
        self._headers: dict[str, tuple[bytes, int]] = {}
        self.slots: dict[str, Slot] = {}
        for file, tensors in shards.items():
            head, starts = shard_header(tensors)
            self._headers[file] = (head, len(head) + sum(n for _, _, n in tensors.values()))
            self.slots |= {name: Slot(file, starts[name], tensors[name][2]) for name in tensors}
        self._open_folder(resume, restart)
        self._files: dict[str, IO[bytes]] = {}
        self._digests: dict[str, str] = {}
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._to_sync: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._room = threading.Condition()
        self._waiting = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    # ---- the folder and its ledger ----------------------------------------------------------------------------

    def _open_folder(self, resume: bool, restart: bool) -> None:
        if self.path.exists() and not (resume or restart):
            raise RefusedError(
                f"{self.path} is left from a run that was stopped.",
                hint="--resume finishes it; --force starts again.",
            )
        if self.path.is_symlink() or (self.path.exists() and not _is_ours(self.path)):
            raise RefusedError(
                f"{self.path} is where OUT is put together, but it holds something else.",
                hint="Choose another OUT, or move it away.",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._ledger = (self.path / LEDGER).open("a+", encoding="utf-8", errors="surrogateescape")
        try:
            fcntl.flock(self._ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._ledger.close()
            raise RefusedError(
                f"another process is writing {self.path}.", hint="Wait for it, or choose another OUT."
            ) from None
        try:
            self._begin(restart)
        except BaseException:
            self._ledger.close()
            raise

    def _begin(self, restart: bool) -> None:
        if restart:
            self._clear()
        lines = self._read_ledger()
        if not lines:
            self._append({"fingerprint": self._fingerprint})
        elif lines[0].get("fingerprint") != self._fingerprint:
            raise RefusedError(
                f"{self.path} was begun from another source, recipe, version or number of threads, so it cannot be "
                "finished with this one.",
                hint="Repeat the first command with --resume, or start again with --force.",
            )
        self._units: dict[str, dict[str, Any]] = {line["unit"]: line for line in lines[1:]}

    def _clear(self) -> None:
        self._ledger.truncate(0)
        for path in self.path.iterdir():
            if path.name != LEDGER:
                path.unlink()

    def _read_ledger(self) -> list[dict[str, Any]]:
        """The complete lines; half a line, left by a kill, is cut off so that the next one starts clean."""
        self._ledger.seek(0)
        text = self._ledger.read()
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.split("\n")[:-1]]
            for line in lines[1:]:
                if not (isinstance(line["unit"], str) and isinstance(line["info"], dict)):
                    raise ValueError("no unit")
                if not all(isinstance(digest, str) for digest in line["sha256"].values()):
                    raise ValueError("no hashes")
            if lines and not isinstance(lines[0]["fingerprint"], str):
                raise ValueError("no fingerprint")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise RefusedError(f"the ledger in {self.path} is damaged.", hint="Start again with --force.") from None
        self._ledger.truncate(len(whole.encode(errors="surrogateescape")))
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        self._ledger.seek(0, os.SEEK_END)
        self._ledger.write(json.dumps(line) + "\n")
        self._ledger.flush()
        os.fsync(self._ledger.fileno())

    def done(self, unit: str) -> bool:
        """Whether an earlier run finished the unit and its bytes on disk still have the hashes of the ledger."""
        if unit not in self._units:
            return False
        digests = self._units[unit]["sha256"]
        for name, digest in digests.items():
            slot = self.slots.get(name)
            if slot is None or _hash_slot(self.path / slot.file, slot) != digest:
                return False
        self._digests |= digests
        return True

    # ---- tensors ----------------------------------------------------------------------------------------------

    def __enter__(self) -> CheckpointWriter:
        try:
            for file, (head, size) in self._headers.items():
                path = self.path / file
                handle = path.open("r+b" if path.exists() else "w+b", buffering=0)
                self._files[file] = handle
                if os.fstat(handle.fileno()).st_size != size:
                    handle.truncate(size)
                _write_at(handle, 0, memoryview(head))
        except BaseException:
            self._close()
            raise
        for work in (self._write_all, self._sync_all):
            thread = threading.Thread(target=work, name=f"llamamoe{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(("stop", None))
        for thread in self._threads:
            thread.join()
        self._close()

    def _close(self) -> None:
        for handle in self._files.values():
            handle.close()
        self._ledger.close()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor: contiguous, on the CPU, of the planned size. It must not be changed afterwards.

        Raises:
            LlamaMoeError: An earlier write failed.
        """
        import torch

        view = memoryview(b"")
        if tensor.numel():
            view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        if view.nbytes != self.slots[name].nbytes:
            raise AssertionError(f"{name}: {view.nbytes} bytes, planned {self.slots[name].nbytes}")
        with self._room:
            self._room.wait_for(lambda: self._waiting < QUEUE_BYTES or self._error is not None)
            self._waiting += view.nbytes
        self._raise()
        self._queue.put(("tensor", (name, view)))

    def finish(self, unit: str, names: list[str], info: dict[str, Any]) -> None:
        """Queue the end of a unit: once its tensors are on disk, the ledger says so and keeps ``info``."""
        self._queue.put(("unit", (unit, names, info)))

    def info(self, unit: str) -> dict[str, Any]:
        """What `finish` was given for the unit, in this run or an earlier one."""
        info: dict[str, Any] = self._units[unit]["info"]
        return info

    def flush(self) -> None:
        """Wait until everything queued is on disk.

        Raises:
            LlamaMoeError: A write failed.
        """
        done = threading.Event()
        self._queue.put(("event", done))
        done.wait()
        self._raise()

    def _raise(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, OSError):
            raise LlamaMoeError(
                f"writing into {self.path} failed: {self._error.strerror or self._error}.",
                hint="What was finished is kept: make room and repeat the command with --resume.",
            ) from self._error
        raise self._error

    # Two threads, so that the disk never waits for hashing: the first hashes and writes, the second syncs.

    def _write_all(self) -> None:
        while True:
            kind, item = self._queue.get()
            if kind == "tensor":
                self._guard(self._write, *item)
            else:
                self._to_sync.put((kind, item))
            if kind == "stop":
                return

    def _sync_all(self) -> None:
        while True:
            kind, item = self._to_sync.get()
            if kind == "stop":
                return
            if kind == "unit":
                self._guard(self._sync_unit, *item)
            else:
                item.set()

    def _guard(self, work: Callable[..., None], *args: Any) -> None:
        """Do one piece of work unless an earlier one failed; a failure is kept for the caller's thread."""
        if self._error is not None:
            return
        try:
            work(*args)
        except BaseException as error:
            with self._room:
                self._error = error
                self._room.notify_all()

    def _write(self, name: str, view: memoryview) -> None:
        slot = self.slots[name]
        digest = hashlib.sha256()
        for start in range(0, view.nbytes, BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            digest.update(block)
            _write_at(self._files[slot.file], slot.offset + start, block)
        self._digests[name] = digest.hexdigest()
        with self._room:
            self._waiting -= view.nbytes
            self._room.notify_all()

    def _sync_unit(self, unit: str, names: list[str], info: dict[str, Any]) -> None:
        for file in {self.slots[name].file for name in names}:
            os.fdatasync(self._files[file].fileno())
        line = {"unit": unit, "sha256": {name: self._digests[name] for name in names}, "info": info}
        self._append(line)
        self._units[unit] = line

    def weights_sha256(self) -> str:
        """One hash over names and hashes of all tensors: equal weights have equal hashes, whatever the sharding."""
        missing = self.slots.keys() - self._digests.keys()
        if missing:
            raise AssertionError(f"not written: {sorted(missing)[:3]}")
        lines = "".join(f"{name} {self._digests[name]}\n" for name in sorted(self._digests))
        return hashlib.sha256(lines.encode()).hexdigest()

    # ---- the end ----------------------------------------------------------------------------------------------

    def publish(self, *, replace: bool = False) -> None:
        """Make ``OUT`` appear: sync everything, drop the ledger, rename the folder.

        Args:
            replace: An existing ``OUT`` is moved aside first and removed after the rename.
        """
        for path in self.path.iterdir():
            _sync(path)
        (self.path / LEDGER).unlink(missing_ok=True)
        _sync(self.path)
        old = None
        if replace and self.out.exists():
            old = self.out.with_name(f"{self.out.name}.replaced-{os.getpid()}")
            self.out.rename(old)
        elif self.out.exists():
            self.out.rmdir()  # an empty folder; anything else was refused before
        self.path.rename(self.out)
        _sync(self.out.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether a folder is one that a run left: it has a ledger, or (stopped at its very start or end) needs none."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    return LEDGER in names or not names or {"config.json", "llamamoe_recipe.yaml", "llamamoe_receipt.json"} <= names


def _write_at(handle: IO[bytes], offset: int, view: memoryview) -> None:
    while view.nbytes:
        count = os.pwrite(handle.fileno(), view, offset)
        view, offset = view[count:], offset + count


def _hash_slot(path: Path, slot: Slot) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(slot.offset)
            left = slot.nbytes
            while left:
                block = file.read(min(left, 2**24))
                if not block:
                    return None
                digest.update(block)
                left -= len(block)
    except OSError:
        return None
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: into a temporary file beside it, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
