"""Distribute a state over the files of all ranks, and read it back on any number of ranks.

`torch.distributed.checkpoint` plans both: a tensor that several ranks hold is stored by one of them, and a reader gets
the parts of its own shards out of whichever files have them. Its default storage pickles an index and tensors, which
is never read here. The files are those of its `HuggingFaceStorageWriter`: safetensors, each with the offsets of its
parts in the header, so that torch can read them without this package. That writer builds a whole file in memory and
does not hash it; here the parts are collected and written one at a time by `write_tensors`.

Not imported by plans.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..checkpoint.manifest import FileEntry
from ..checkpoint.tensor_file import write_tensors
from .ranks import several_ranks

State = dict[str, torch.Tensor]
"""Tensors by name, whole or sharded; of the same names on every rank, except those that a single rank has."""


@dataclass
class PendingFile:
    """A file that this rank is to write.

    Attributes:
        path: The name that it gets.
        tensors: Its tensors.
        facts: Entries of its header.
    """

    path: Path
    tensors: State = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def write(self) -> FileEntry:
        """Write the file to the disk; return its size and hash."""
        return write_tensors(self.path, self.tensors, self.facts)


def pending_shard(state: State, path: Path, *, copy: bool = False) -> PendingFile:
    """Return the file with this rank's part of a state. Every rank must call it.

    Args:
        state: The tensors to store. Unless they are copied, they must not change until the file is written.
        path: The name of this rank's file.
        copy: Copy this rank's part to the CPU.
    """
    collector = _Collector()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(
            {name: _contiguous(value) for name, value in state.items()},
            storage_writer=collector,
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=not several_ranks(),
        )
    places = {name: {"saved_offsets": offsets} for name, offsets in collector.offsets.items()}
    tensors = {name: value.to("cpu", copy=copy) if copy else value for name, value in collector.tensors.items()}
    return PendingFile(path, tensors, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})


class _Collector(StorageWriter):
    """Keeps what the plan assigns to this rank, in place of writing it."""

    def __init__(self) -> None:
        self.tensors: State = {}
        self.offsets: dict[str, list[int]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: there is one save for each collector."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Keep the tensors of the plan."""
        for item in plan.items:
            assert item.tensor_data is not None, "a state holds tensors only"
            value = planner.resolve_data(item)
            assert isinstance(value, torch.Tensor)
            self.tensors[item.index.fqn] = value
            self.offsets[item.index.fqn] = list(item.tensor_data.chunk.offsets)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: every file describes its own parts."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return True: there is none."""
        return True


class _TensorPlanner(DefaultLoadPlanner):
    """Torch's planner without its way to read pickled objects."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


def stored(folder: Path) -> Mapping[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor in a folder of shards, by its headers."""
    listed = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in listed.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load_shards(state: State, folder: Path, *, together: bool = True) -> None:
    """Fill the tensors of a state from a folder of shards, in place.

    Args:
        state: Tensors of the stored shapes, sharded in any way.
        folder: The folder.
        together: Whether every rank calls it, for a state of the same names.

    Raises:
        ValueError: A file does not hold what the state needs, or is damaged.
    """
    targets = {name: _contiguous(value) for name, value in state.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(
                targets,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                planner=_TensorPlanner(flatten_state_dict=False),
                no_dist=not (together and several_ranks()),
            )
    except CheckpointException as error:  # of every rank, the first tells enough
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{type(cause).__name__}: {cause}") from error
    for name, value in targets.items():
        target = state[name]
        if value is not target:
            assert isinstance(value, DTensor)
            assert isinstance(target, DTensor)
            target.to_local().copy_(value.redistribute(placements=target.placements).to_local())


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor with one connected part on each rank, as torch's plans assume of all.

    Experts that are spread over ranks and then sharded by FSDP2 have a part of several pieces (`_StridedShard`);
    transformers 5.23 does the same in its `save_optimizer_distributed`.
    """
    if not isinstance(value, DTensor) or not any(isinstance(each, _StridedShard) for each in value.placements):
        return value
    placements = [Shard(each.dim) if isinstance(each, _StridedShard) else each for each in value.placements]
    return value.redistribute(placements=placements)
