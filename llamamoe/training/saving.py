"""Write a checkpoint on all ranks: each its own files, the first the list of all of them, then its name.

Not imported by plans.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from ..checkpoint.files import write_text
from ..checkpoint.manifest import FileEntry
from ..checkpoint.reader import INDEX
from ..errors import ElsewhereError, LlamaMoeError
from .ranks import several_ranks
from .run_folder import is_of_the_disk
from .shards import PendingFile

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """The files that a rank wrote.

    Attributes:
        files: Size and hash of its files, by path below the checkpoint.
        weights: Tensors of the model by name, with their file.
        nbytes: Bytes of these tensors.
    """

    files: Mapping[str, FileEntry] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0


def on_all_ranks(work: Callable[[], T], group: Any = None) -> list[T]:
    """Do this rank's part of something; return the results of all ranks.

    Args:
        work: The part of this rank.
        group: The process group; None for the one of training.

    Raises:
        OSError: A rank could not write. It is raised on all ranks, so that none waits for another.
        LlamaMoeError: A rank raised it; an `ElsewhereError` on the others.
    """
    if not several_ranks():
        return [work()]
    result: T | None = None
    own: Exception | None = None
    failure: OSError | LlamaMoeError | None = None
    try:
        result = work()
    except LlamaMoeError as error:
        own, failure = error, ElsewhereError(f"process {dist.get_rank()} failed: {error.message}")
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_of_the_disk(error):  # a device or another rank failed, which is reported elsewhere
            raise
        own, failure = error, error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
    found: list[tuple[T, OSError | LlamaMoeError | None]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(found, (result, failure), group=group)
    failures = [each for _, each in found if each is not None]
    if failures:
        raise own or failures[0]
    return [each for each, _ in found]


def write_files(folder: Path, pending: Sequence[PendingFile], weights: PendingFile | None) -> Report:
    """Write this rank's files of a checkpoint to the disk.

    Args:
        folder: The folder in which the checkpoint is assembled.
        pending: Files of the run's state.
        weights: The file of the model, if this rank writes one.
    """
    model = [] if weights is None else [weights]
    files = {each.path.relative_to(folder).as_posix(): each.write() for each in (*pending, *model)}
    if weights is None:
        return Report(files)
    nbytes = sum(value.numel() * value.element_size() for value in weights.tensors.values())
    return Report(files, dict.fromkeys(weights.tensors, weights.path.name), nbytes)


def write_index(folder: Path, reports: Sequence[Report]) -> None:
    """Write the index of a model in several files; nothing for one file."""
    weights = {name: file for report in reports for name, file in report.weights.items()}
    if len(set(weights.values())) > 1:
        index = {"metadata": {"total_size": sum(report.nbytes for report in reports)}, "weight_map": weights}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def all_files(reports: Sequence[Report]) -> dict[str, FileEntry]:
    """Return the files of all ranks."""
    return {name: entry for report in reports for name, entry in report.files.items()}


class Background:
    """One piece of work at a time, in a thread beside training.

    The thread does not keep a process alive that is interrupted.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; earlier work must have been waited for."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def wait(self) -> bool:
        """Wait for the work to end; return whether there was any. An error in it is raised here."""
        if self._thread is None:
            return False
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
        return True
