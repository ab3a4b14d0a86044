"""Coordinate several processes that heal one checkpoint and pass finished layers to the first one.

Not imported by plans. Processes are those of ``torchrun``; they communicate over gloo, and pass layers in files
of the folder in which OUT is assembled, so that a finished layer survives a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.files import make_folder, save_tensors
from ..errors import LlamaMoeError, UsageError
from ..lazy import dist, safetensors, torch

T = TypeVar("T")
TIMEOUT = timedelta(days=7)
"""Maximum time that processes wait for one that trains; processes that die are noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """The position of this process among all.

    Attributes:
        rank: Its number.
        world: Number of processes.
        local_rank: Its number on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def takes(self, layer: int) -> bool:
        """Return whether this process heals the layer."""
        return layer % self.world == self.rank

    def share(self, value: T) -> T:
        """Return the first process's value in all of them."""
        if self.world == 1:
            return value

        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Call a function in the first process; its `LlamaMoeError` is raised in all of them.

        Returns:
            The result in the first process, None in the others.
        """
        result: T | None = None
        error: LlamaMoeError | None = None
        if self.rank == 0:
            try:
                result = work()
            except LlamaMoeError as found:
                error = found
        error = self.share(error)
        if error is not None:
            raise error
        return result

    def device(self, name: str) -> str:
        """Return the device of the recipe, or this process's own GPU if the recipe names no number."""
        if self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            try:
                dist.barrier()
            except RuntimeError as error:
                raise LlamaMoeError(
                    f"another process stopped before its layers were healed ({str(error).splitlines()[0][:200]}).",
                    hint="Its own message gives the reason; --resume continues with the missing layers.",
                ) from None


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or use this one alone.

    Raises:
        UsageError: The environment names several processes, but they cannot connect.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return

    ours = not dist.is_initialized()
    if ours:
        try:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"WORLD_SIZE is {world}, but the processes cannot connect ({str(error)[:200]}).",
                hint="Start them with: torchrun --nproc-per-node N -m llamamoe_cli heal ...",
            ) from None
    try:
        yield Ranks(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()


class Handoff:
    """Finished layers of other processes, one file each.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer.{layer}.safetensors"

    def holds(self, layer: int) -> bool:
        """Return whether the layer is there. A file with its final name is complete."""
        return self._path(layer).is_file()

    def give(self, layer: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Write the layer, whole or not at all."""
        make_folder(self.folder)
        save_tensors(self._path(layer), tensors, {"facts": json.dumps(facts)})

    def take(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read the layer."""
        with safetensors.safe_open(self._path(layer), framework="pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
