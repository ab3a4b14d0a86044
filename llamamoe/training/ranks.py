"""Sum over the ranks of a distributed run. Needs torch, so it is not imported by plans."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from ..errors import UsageError


def several_ranks(group: Any = None) -> bool:
    """Return whether this process is one of several that compute together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def all_reduced(values: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Return the sum (or the result of ``op``) over all ranks, in place; unchanged for one rank. No gradient."""
    if several_ranks():
        dist.all_reduce(values, op)
    return values


class _Sum(torch.autograd.Function):
    """Forward: the sum over ranks. Backward: the incoming gradient times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.size = dist.get_world_size(group)
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.size, None


def sum_over_ranks(values: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return the sum of ``values`` over all ranks, with a gradient; ``values`` itself in a run of one process.

    Every rank must go on to compute the same loss from it. Then the incoming gradient is the same on all ranks,
    and the gradient of all their losses by this rank's values is that gradient times the number of ranks: no second
    communication is needed, which could also be ordered differently from those of DDP. DDP and FSDP divide gradients by
    the number of ranks, which leaves the gradient of one process with the tokens of all.

    Args:
        values: Values of the same shape on every rank.
        group: Process group; None for all ranks.
    """
    if not several_ranks(group):
        return values
    total: torch.Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]
    return total


def check_same_checkpoint(step: int, device: torch.device) -> None:
    """Refuse to start if ranks found different checkpoints in the run's folder; every rank must call it.

    Args:
        step: Step of the newest intact checkpoint that this rank found; -1 if there is none.
        device: Device of tensors in collective calls.

    Raises:
        UsageError: The checkpoints differ; raised on all ranks.
    """
    ends = all_reduced(torch.tensor([step, -step], device=device), dist.ReduceOp.MAX)
    newest, oldest = int(ends[0]), -int(ends[1])
    if newest != oldest:
        seen = "none" if oldest < 0 else f"checkpoint-{oldest}"
        raise UsageError(
            f"the processes do not see the same run: one finds checkpoint-{newest}, another {seen}.",
            hint="Give an --out on a file system that all machines share.",
        )


def cut_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard ``values``, equal on all ranks, as ``like`` is sharded; return them unchanged if it is not."""
    if not isinstance(like, DTensor):
        return values
    whole = DTensor.from_local(values, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)
