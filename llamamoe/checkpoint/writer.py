"""Write a checkpoint that appears whole or not at all, tensor by tensor, and resume a stopped one.

Everything is written into ``OUT.partial/``. The layout of every shard is known before the first byte, so tensors
may come in any order and are not collected. After each unit (a layer) the data are synced and a line with the hashes
of its tensors is added to a ledger; ``resume`` checks those hashes and skips the units that match. `publish` renames
the folder.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..errors import RefusedError
from ..lazy import torch
from ..progress import RESUMED, Progress, ProgressCallback
from .files import open_update, remove_temporaries, sync_path
from .layout import Slot, shard_header
from .ledger import LEDGER, STATES, Ledger, partial_path, replaced_path
from .out_folder import foreign_names

QUEUE_BYTES = 256 * 2**20
"""Maximum number of bytes that wait for the disk; bounds the memory of the writer."""
BLOCK_BYTES = 2**18
"""Bytes written at a time: the page cache takes them in a third of the system time of 1 MiB (measured on ext4)."""


class CheckpointWriter:
    """Writes the shards of one checkpoint into ``OUT.partial/``. Use as a context manager.

    Args:
        out: The folder to create; see `check_out` for what may exist there.
        shards: file name to (tensor name to (dtype, shape, bytes)), in file order.
        fingerprint: Identifies the output; a resume with a different one is refused.
        resume: Resume from the content of ``OUT.partial/``, if it exists.
        restart: Discard the content of ``OUT.partial/``.

    Raises:
        RefusedError: ``OUT.partial/`` exists without ``resume`` or ``restart``, belongs to another output, also
            contains something else, or is in use.
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
        self._headers: dict[str, tuple[bytes, int]] = {}
        self.slots: dict[str, Slot] = {}
        for file, tensors in shards.items():
            head, starts = shard_header(tensors)
            self._headers[file] = (head, len(head) + sum(n for _, _, n in tensors.values()))
            self.slots |= {name: Slot(file, starts[name], tensors[name][2]) for name in tensors}
        foreign = partial(foreign_names, also={*shards, LEDGER, STATES})
        self._ledger = Ledger(self.path, fingerprint, resume=resume, restart=restart, foreign=foreign)
        self._files: dict[str, IO[bytes]] = {}
        self._digests: dict[str, str] = {}
        self._kept: set[str] = set()
        # a chain of threads, so that hashing, writing and the disk do not wait for one another
        self._stages = ({"tensor": self._hash}, {"tensor": self._write}, {"unit": self._sync_unit})
        self._queues: list[queue.Queue[tuple[str, Any]]] = [queue.Queue() for _ in self._stages]
        self._room = threading.Condition()
        self._waiting = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    # ---- units ------------------------------------------------------------------------------------------------

    def done(self, unit: str) -> bool:
        """Return whether an earlier run finished the unit and its bytes on disk still have the hashes of the ledger."""
        if unit not in self._ledger.units:
            return False
        if unit in self._kept:
            return True
        digests = self._ledger.units[unit]["sha256"]
        for name, digest in digests.items():
            slot = self.slots.get(name)
            if slot is None or _hash_slot(self.path / slot.file, slot) != digest:
                return False
        self._digests |= digests
        self._kept.add(unit)
        return True

    def tell_kept(self, units: Iterable[str], noun: str, progress: ProgressCallback) -> None:
        """Report to ``progress`` how many of the units an interrupted run finished, if there was one."""
        if self._ledger.units:
            names = list(units)
            progress(Progress(RESUMED, sum(map(self.done, names)), len(names), noun))

    def earlier(self) -> dict[str, Any]:
        """Return ``seconds_before``, those of interrupted runs whose work is kept; empty if there is none."""
        before = self._ledger.seconds_before if self._kept else 0.0
        return {"seconds_before": before} if before else {}

    # ---- tensors ----------------------------------------------------------------------------------------------

    def __enter__(self) -> CheckpointWriter:
        try:
            for file, (head, size) in self._headers.items():
                handle = self._files[file] = open_update(self.path / file)
                if os.fstat(handle.fileno()).st_size != size:
                    handle.truncate(size)
                _write_at(handle, 0, memoryview(head))
        except BaseException:
            self._close()
            raise
        for stage in range(len(self._stages)):
            self._threads.append(threading.Thread(target=self._run, args=(stage,), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queues[0].put(("stop", None))
        for thread in self._threads:
            thread.join()
        self._close()

    def _close(self) -> None:
        for handle in self._files.values():
            handle.close()
        self._ledger.close()

    def make_room(self, name: str) -> None:
        """Wait until a tensor's bytes fit beside those that wait for the disk; to be called before the tensor is made.

        Raises:
            OSError: An earlier write failed.
        """
        room = max(0, QUEUE_BYTES - self.slots[name].nbytes)
        with self._room:
            self._room.wait_for(lambda: self._waiting <= room or self._error is not None)
        self._raise()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor: contiguous, on the CPU, of the planned size. It must not be changed afterwards.

        Raises:
            OSError: An earlier write failed.
        """
        view = tensor_bytes(tensor)
        if view.nbytes != self.slots[name].nbytes:
            raise AssertionError(f"{name}: {view.nbytes} bytes, planned {self.slots[name].nbytes}")
        self.make_room(name)
        with self._room:
            self._waiting += view.nbytes
        self._queues[0].put(("tensor", (name, view)))

    def finish(self, unit: str, names: list[str], info: dict[str, Any]) -> None:
        """Queue the end of a unit: once its tensors are on disk, the ledger records it with ``info``."""
        self._queues[0].put(("unit", (unit, names, info)))

    def info(self, unit: str) -> dict[str, Any]:
        """Return the ``info`` passed to `finish` for the unit, in this run or an earlier one."""
        info: dict[str, Any] = self._ledger.units[unit]["info"]
        return info

    def flush(self) -> None:
        """Wait until everything queued is on disk.

        Raises:
            OSError: A write failed.
        """
        done = threading.Event()
        self._queues[0].put(("event", done))
        done.wait()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, stage: int) -> None:
        """Run one thread: do this stage's part of each item and pass it on. The last stage answers `flush`."""
        while True:
            kind, item = self._queues[stage].get()
            work = self._stages[stage].get(kind)
            if work is not None:
                self._guard(work, *item)
            if stage + 1 < len(self._queues):
                self._queues[stage + 1].put((kind, item))
            elif kind == "event":
                item.set()
            if kind == "stop":
                return

    def _guard(self, work: Callable[..., None], *args: Any) -> None:
        """Do one piece of work unless an earlier one failed; a failure is stored for the caller's thread."""
        if self._error is not None:
            return
        try:
            work(*args)
        except BaseException as error:
            with self._room:
                self._error = error
                self._room.notify_all()

    def _hash(self, name: str, view: memoryview) -> None:
        self._digests[name] = hashlib.sha256(view).hexdigest()

    def _write(self, name: str, view: memoryview) -> None:
        slot = self.slots[name]
        _write_at(self._files[slot.file], slot.offset, view)
        with self._room:
            self._waiting -= view.nbytes
            self._room.notify_all()

    def _sync_unit(self, unit: str, names: list[str], info: dict[str, Any]) -> None:
        for file in {self.slots[name].file for name in names}:
            os.fdatasync(self._files[file].fileno())
        line = {"unit": unit, "sha256": {name: self._digests[name] for name in names}, "info": info}
        self._ledger.append(line)
        self._ledger.units[unit] = line

    def weights_sha256(self) -> str:
        """Return one hash of all tensors (see `joined_sha256`), independent of the sharding."""
        missing = self.slots.keys() - self._digests.keys()
        if missing:
            raise AssertionError(f"not written: {sorted(missing)[:3]}")
        return joined_sha256(self._digests)

    def unit_sha256(self) -> dict[str, str]:
        """Return one hash for each finished unit, so that a change can be traced to a layer."""
        return {unit: joined_sha256(line["sha256"]) for unit, line in self._ledger.units.items() if line["sha256"]}

    # ---- the end ----------------------------------------------------------------------------------------------

    def publish(self, *, replace: bool = False) -> None:
        """Make ``OUT`` appear: sync everything, drop the ledger, rename the folder.

        Args:
            replace: An existing ``OUT`` is moved aside first and removed after the rename.
        """
        remove_temporaries(self.path)
        for path in self.path.iterdir():
            sync_path(path)
        (self.path / LEDGER).unlink(missing_ok=True)
        sync_path(self.path)
        old, moved = replaced_path(self.out), False
        if self.out.exists() and any(self.out.iterdir()):
            if not replace:
                raise RefusedError(
                    f"OUT ({self.out}) was filled by another process meanwhile.", hint="Choose another name."
                )
            self.out.rename(old)
            moved = True
        elif self.out.exists():
            self.out.rmdir()
        try:
            self.path.rename(self.out)
        except OSError:
            if moved:
                old.rename(self.out)
            raise
        sync_path(self.out.parent)
        if moved:
            shutil.rmtree(old, ignore_errors=True)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU as they are stored in a file, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def joined_sha256(digests: Mapping[str, str]) -> str:
    """Return one hash over the names of tensors and the hashes of their bytes, independent of their order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _write_at(handle: IO[bytes], offset: int, view: memoryview) -> None:
    while view.nbytes:
        count = os.pwrite(handle.fileno(), view[:BLOCK_BYTES], offset)
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
