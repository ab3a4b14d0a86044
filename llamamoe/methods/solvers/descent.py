"""Run Adam on the weights of one layer, by mini-batches of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ...errors import LlamaMoeError
from ...lazy import np, torch

WARM_UP = 20
"""Warm-up steps, before which Adam's second moments are not meaningful."""
BETAS = (0.9, 0.98)


def descend(
    optimiser: torch.optim.Optimizer,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    num_tokens: int,
    rng: np.random.Generator,
    *,
    batch: int,
    epochs: int,
    what: str,
    hint: str,
) -> None:
    """Run all steps of an optimiser.

    Args:
        optimiser: Its groups of parameters have ``size`` (what a step is relative to) and ``share`` (the largest step,
            as a share of it).
        loss_of: Returns the loss of some tokens, given their indices int64 ``[batch]``.
        num_tokens: Number of tokens; an incomplete last batch of an epoch is skipped.
        rng: Draws the order of the tokens, epoch by epoch.
        batch: Tokens per step.
        epochs: Sweeps over the tokens.
        what: Name of the loss in an error.
        hint: Hint of that error.

    Raises:
        LlamaMoeError: The loss is NaN or infinite.
    """
    steps = epochs * max(1, num_tokens // batch)
    with torch.enable_grad():
        for step, rows in enumerate(_minibatches(num_tokens, rng, batch, epochs)):
            for group in optimiser.param_groups:
                group["lr"] = group["size"] * step_size(group["share"], step, steps)
            loss = loss_of(rows)
            if not bool(loss.isfinite()):
                raise LlamaMoeError(f"{what} is no longer finite at step {step}.", hint=hint)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def step_size(largest: float, step: int, steps: int) -> float:
    """Return the size of a step: a short rise to ``largest``, then a half cosine to zero."""
    return largest * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _minibatches(num_tokens: int, rng: np.random.Generator, batch: int, epochs: int) -> Iterator[torch.Tensor]:
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(num_tokens))
        for start in range(0, max(1, num_tokens // batch) * batch, batch):
            yield order[start : start + batch]
