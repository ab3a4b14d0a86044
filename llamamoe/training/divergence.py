"""Handle a loss or gradient that is not finite: locate its micro-batch and explain how to continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import LlamaMoeError
from .ranks import all_reduced
from .recipe import PretrainRecipe
from .run_folder import start_anew

Place = tuple[int, int]
"""Step and micro-batch, counted over all ranks."""


class DivergedError(LlamaMoeError):
    """The loss or a gradient is no longer finite; the weights are still those of the previous step."""


def first_bad(losses: Sequence[tuple[Place, torch.Tensor]], device: torch.device) -> Place | None:
    """Return the first micro-batch of a step whose loss is NaN or infinite, on any rank; None if all are finite.

    Every rank must call it with its own micro-batches (at least one), and all get the same result.
    """
    none = 2**31
    bad = [index for (_, index), loss in losses if not bool(loss.isfinite())]
    index = int(all_reduced(torch.tensor(min(bad, default=none), device=device), dist.ReduceOp.MIN))
    return None if index == none else (losses[0][0][0], index)


def diverged(
    place: Place | None, step: int, norm: float, describe: Callable[[Place], str], recipe: PretrainRecipe, folder: Path
) -> DivergedError:
    """Return the error, once the checkpoint of the previous step exists.

    Args:
        place: The micro-batch, if its loss is not finite.
        step: Steps finished before.
        norm: Norm of the gradient.
        describe: Describes the text of a micro-batch.
        recipe: The run's recipe.
        folder: The run's folder.
    """
    what = f"the loss is {'NaN or infinite' if place else 'finite, but the gradient is not'}"
    where = f"step {step + 1}"
    if place:
        where += f", micro-batch {place[1]} ({describe(place)})"
    return DivergedError(
        f"{where}: {what} (gradient norm {norm}). The weights before this step are in checkpoint-{step}.",
        hint="Lower optimizer.lr, raise lr_schedule.warmup, set precision.compute=float32, or leave the batch out by another "
        f"seed: {start_anew(recipe, folder / f'checkpoint-{step}')}.",
    )
