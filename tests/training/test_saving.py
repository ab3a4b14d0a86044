"""Ranks that save together: an error of one is an error of all, and layers are divided evenly."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from llamamoe.errors import CheckpointError, ElsewhereError
from llamamoe.training.native_weights import divide
from llamamoe.training.saving import on_all_ranks
from tests import forked  # noqa: F401  # what ranks have imported


def _rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def full() -> int:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer/rank-00001.safetensors")
        return rank

    with pytest.raises(OSError, match=r"No space left on device.*rank-00001"):
        on_all_ranks(full)

    def refused() -> int:
        if rank == 0:
            raise CheckpointError("there is a fault", hint="Mend it.")
        return rank

    with pytest.raises(ElsewhereError if rank else CheckpointError, match="there is a fault"):
        on_all_ranks(refused)
    assert on_all_ranks(lambda: rank) == [0, 1]
    dist.destroy_process_group()


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver")


def test_a_layer_is_written_by_one_rank() -> None:
    sizes = {f"model.layers.{layer}.{part}": size for layer in range(6) for part, size in (("up", 90), ("down", 10))}
    owners = divide({"embed": 150, "norm": 1, **sizes, "head": 150}, 3)
    held = [0, 0, 0]
    for names, rank in owners:
        assert len({name.partition(".up")[0].partition(".down")[0] for name in names}) == 1
        held[rank] += sum({"embed": 150, "norm": 1, "head": 150, **sizes}[name] for name in names)
    assert sorted(name for names, _ in owners for name in names) == sorted(["embed", "norm", "head", *sizes])
    assert max(held) - min(held) <= 100
