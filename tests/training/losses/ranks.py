"""One of two ranks that compute a balance loss together. Imports little: it starts in a process of its own."""

from __future__ import annotations

from typing import Any

import torch

from llamamoe.training.losses import LOSSES, LossContext
from llamamoe.training.moe_layers import MoeLayer
from llamamoe.training.routing import Routing

N, H = 6, 16
NAMES = ("switch", "cv_squared")


def loss(name: str, **options: Any) -> Any:
    cls = LOSSES.get(name)
    return cls(cls.Options(**options))


def from_logits(logits: torch.Tensor, k: int = 2, noise: torch.Tensor | None = None, **extra: Any) -> Routing:
    """A renormalised softmax router in the dtype of the logits, written out plainly."""
    chosen_by = logits if noise is None else logits + noise * extra["noise_std_TN"]
    values, indices = chosen_by.topk(k, dim=-1)
    if noise is not None:
        extra["selection_TN"] = chosen_by
    moe = MoeLayer(0, "", torch.nn.Module(), torch.nn.Module(), logits.shape[-1], k, "renormalised", 1.0)
    return Routing(moe, logits, values.softmax(-1), indices, **extra)


def rows() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(N, H, generator=torch.Generator().manual_seed(9)) / 4)


def rank_routing(rows_NH: torch.Tensor, *ranks: int) -> Routing:
    """Return the router's output for the tokens of these ranks; each rank has another number of them."""
    x_TH = torch.cat([torch.randn(10 + 5 * r, H, generator=torch.Generator().manual_seed(r)) for r in ranks])
    noise = torch.cat([torch.rand(10 + 5 * r, N, generator=torch.Generator().manual_seed(r)) for r in ranks])
    return from_logits(x_TH @ rows_NH.T, 2, noise, noise_std_TN=torch.ones_like(noise))


def averaged_gradient(gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient of a gate's parameter after the reduction, where this rank had ``gradient``."""
    from llamamoe.training.gates.noisy_top_k import NoisyTopK

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient
    gate = NoisyTopK()
    gate._rows = torch.nn.ParameterDict({"0": parameter})
    gate.average_gradients()
    assert parameter.grad is not None
    return parameter.grad


def micro_losses(rank: int) -> list[list[tuple[tuple[int, int], torch.Tensor]]]:
    """Losses of this rank's two micro-batches, in steps where none, one of rank 1, and some of both are not finite."""
    nan, inf, fine = (torch.tensor(value) for value in (float("nan"), float("inf"), 2.0))
    steps = [[fine, fine], [fine, nan if rank else fine], [fine if rank else inf, nan]]
    return [[((7, 2 * turn + rank), loss) for turn, loss in enumerate(losses)] for losses in steps]


def told_of_checkpoints(step: int) -> str:
    """Return the error of a rank that found this checkpoint."""
    from llamamoe.errors import UsageError
    from llamamoe.training.ranks import check_same_checkpoint

    try:
        check_same_checkpoint(step, torch.device("cpu"))
    except UsageError as error:
        return error.message
    return "the same"


def run(rank: int, folder: str) -> None:
    """Save value and gradient (averaged over ranks, as DDP does) for each loss and window."""
    import torch.distributed as dist

    from llamamoe.training.divergence import first_bad
    from llamamoe.training.ranks import sum_over_ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for window in ("all_ranks", "micro_batch"):
        for name in NAMES:
            rows_NH = rows()
            context = LossContext(all_reduce=sum_over_ranks)
            value = loss(name, window=window).loss([rank_routing(rows_NH, rank)], context)
            value.backward()
            dist.all_reduce(rows_NH.grad)
            found[f"{name}-{window}"] = (value.detach(), rows_NH.grad / 2)
    found["gate"] = averaged_gradient(None if rank else torch.tensor([3.0, 5.0]))
    found["bad"] = [first_bad(losses, torch.device("cpu")) for losses in micro_losses(rank)]
    found["checkpoints"] = [told_of_checkpoints(40), told_of_checkpoints(-1), told_of_checkpoints(-1 if rank else 40)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
