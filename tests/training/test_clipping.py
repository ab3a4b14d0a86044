"""Clipping of the gate's gradients: together with the model's, as one call of torch's would, or apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamamoe import pretrain
from llamamoe.training.build import assemble

from .runs import lines_of, recipe_of


def clipped(
    world: dict[str, str], out: Path, *overrides: str
) -> tuple[float, list[torch.Tensor], list[torch.Tensor], int]:
    """The norm, all gradients before and after, and how many of them are the model's."""
    recipe = recipe_of(world, "gate=noisy_top_k", *overrides, losses=[{"name": "cv_squared", "coefficient": 3.0}])
    trainer, _ = assemble(recipe, out, Path(recipe.model), None, None)
    model: Any = trainer.model
    model.train()
    trainer.compute_loss(model, next(iter(trainer.parts.batches))).backward()
    of_model = [each for each in model.parameters() if each.grad is not None]
    learned = [*of_model, *trainer.parts.dynamics.gate_parameters()]
    before = [each.grad.clone() for each in learned]
    norm = float(trainer._clip_grad_norm(model))
    assert float(trainer._get_grad_norm(model, torch.tensor(norm))) == pytest.approx(norm)
    return norm, before, [each.grad for each in learned], len(of_model)


def by_torch(gradients: list[torch.Tensor], most: float) -> tuple[float, list[torch.Tensor]]:
    copies = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients]
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(copies, most))
    return norm, [each.grad for each in copies if each.grad is not None]


@pytest.mark.parametrize("most", [0.01, 1e6])
def test_all_gradients_are_clipped_by_one_norm(most: float, world: dict[str, str], tmp_path: Path) -> None:
    norm, before, after, of_model = clipped(world, tmp_path, f"optimizer.max_grad_norm={most}")
    expected_norm, expected = by_torch(before, most)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert norm > (1 + 1e-5) * by_torch(before[:of_model], most)[0], "the gate's gradients count"
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-9)


def test_or_each_by_its_own(world: dict[str, str], tmp_path: Path) -> None:
    norm, before, after, of_model = clipped(
        world, tmp_path, "optimizer.max_grad_norm=0.01", "optimizer.gate_clipping=apart"
    )
    expected_norm, expected = by_torch(before[:of_model], 0.01)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    torch.testing.assert_close(after, expected + by_torch(before[of_model:], 0.01)[1], rtol=1e-5, atol=1e-9)


def test_what_is_not_clipped_is_averaged_and_looked_at_once_a_step(world: dict[str, str], tmp_path: Path) -> None:
    """Without clipping the norm is the model's, and a run goes on after its first step."""
    pretrain(recipe_of(world, "gate=noisy_top_k", "optimizer.max_grad_norm=0", "steps=3"), tmp_path / "run")
    norms = [line["grad_norm"] for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    assert len(set(norms)) == 3
