"""Sums over the ranks of a distributed run. Imported by running code only: it needs torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


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
    """The sum of ``values`` over all ranks, with a gradient; ``values`` itself in a run of one process.

    Every rank must go on to compute the same loss from it. Then the gradient that comes back is the same on all ranks,
    and what all of their losses say about this rank's values is that gradient times the number of ranks: no second
    communication, which could also meet those of DDP in another order. DDP and FSDP divide gradients by the number of
    ranks; what is left is the gradient of one process that holds the tokens of all.

    Args:
        values: Of the same shape on every rank.
        group: Process group; None for all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return values
    total: torch.Tensor = _Sum.apply(values, group)  # type: ignore[no-untyped-call]
    return total
