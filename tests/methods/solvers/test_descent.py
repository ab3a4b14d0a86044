"""The steps that heal and the repair distill share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.solvers.descent import descend, step_size


def test_the_step_rises_and_falls() -> None:
    steps = [step_size(0.5, i, 100) for i in range(100)]
    assert steps[0] < steps[10] < steps[19] <= 0.5
    assert steps[20:] == sorted(steps[20:], reverse=True)
    assert 0 < steps[-1] < 1e-3


def run(seen: list[list[int]], loss: float = 1.0) -> torch.Tensor:
    weight = torch.ones(3, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [weight], "size": 2.0, "share": 0.1}])

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.tolist())
        return weight.square().sum() * loss

    descend(optimiser, loss_of, 10, np.random.default_rng(0), batch=4, epochs=3, what="it", hint="less")
    return weight.detach()


def test_every_epoch_takes_other_whole_batches() -> None:
    seen: list[list[int]] = []
    assert float(run(seen).abs().max()) < 1
    assert [len(rows) for rows in seen] == [4] * 6
    epochs = [[*seen[i], *seen[i + 1]] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_loss_that_is_not_finite_ends_it() -> None:
    with pytest.raises(LlamaMoeError, match="it is no longer finite at step 0"):
        run([], float("nan"))
