"""The ridge router on problems whose answer is known, and against numpy.linalg.lstsq."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import ExpertWeights, FfnWeights
from llamamoe.methods.routers.ridge import Ridge
from llamamoe.methods.solvers.router_regression import centred, fit_rows, log_contribution
from tests.converted import EXPERTS, HIDDEN, make_context, make_ffn, make_inputs, make_moe, make_partition, plain_hidden


def plain_contributions(weights: ExpertWeights, partition: object, x: torch.Tensor, kind: str) -> np.ndarray:
    """float64 ``[T, N]``, expert by expert."""
    hidden, down = plain_hidden(weights.gate_PH, weights.up_PH, x), weights.down_HP.double().numpy()
    shared, (num_experts, width) = len(partition.shared), partition.experts.shape
    out = np.zeros((len(x), num_experts))
    for i in range(num_experts):
        places = range(shared + i * width, shared + (i + 1) * width)
        if kind == "norm":
            out[:, i] = (sum(np.outer(hidden[:, p], down[:, p]) for p in places) ** 2).sum(1)
        else:
            out[:, i] = sum(hidden[:, p] ** 2 * (down[:, p] @ down[:, p]) for p in places)
    return out


def stacked(x: np.ndarray, aim: np.ndarray, ridge: float, scale: np.ndarray | float = 1.0) -> np.ndarray:
    """float64 ``[N, H]``: ridge regression as stacked rows."""
    x, aim = x * np.reshape(scale, (-1, 1)), aim * np.reshape(scale, (-1, 1))
    lam = ridge * (x**2).sum() / x.shape[1]
    rows = np.vstack([x, np.sqrt(lam) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.vstack([aim, np.zeros((x.shape[1], aim.shape[1]))]), rcond=None)[0].T


@pytest.mark.parametrize("kind", ["padded", "overlap", "plain"])
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("contribution", ["norm", "power"])
@pytest.mark.parametrize("weighting", ["none", "residual"])
def test_rows_solve_the_ridge_problem(kind: str, log: bool, contribution: str, weighting: str) -> None:
    ffn, inputs, partition = make_ffn(), make_inputs(), make_partition(kind)
    options = Ridge.Options(ridge=0.05, log=log, floor=0.1, contribution=contribution, weighting=weighting)
    context = make_context(make_moe(ffn, partition), inputs)
    rows = Ridge(options).rows(ffn, partition, context)
    aim = plain_contributions(ExpertWeights.of_parent(ffn, partition), partition, inputs.x_TH, contribution)
    if log:
        aim = np.log(aim / aim.mean(1, keepdims=True) + 0.1)
    aim -= aim.mean(1, keepdims=True)
    scale = 1 / inputs.residual_scale_T.double().numpy() if weighting == "residual" else 1.0
    expected = stacked(inputs.x_TH.double().numpy(), aim, 0.05, scale)
    assert rows.dtype == torch.float32
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_finds_the_planted_rows() -> None:
    """Log contributions that are linear in x, and a shift of each token that no router can see."""
    inputs = make_inputs(500)
    g = torch.Generator().manual_seed(0)
    planted = centred(torch.randn(HIDDEN, EXPERTS, generator=g)).T
    aims = [centred(inputs.x_TH[part] @ planted.T + torch.randn(1, generator=g)) for part in inputs.batches()]
    rows = fit_rows(make_context(make_moe(make_ffn()), inputs), iter(aims), 1e-9, "none")
    torch.testing.assert_close(rows, planted, rtol=1e-4, atol=1e-4)


def test_planted_experts_are_chosen() -> None:
    """Experts that open for one direction each: a token goes to the expert of its direction."""
    direction = torch.eye(EXPERTS, HIDDEN)
    gate = direction.repeat_interleave(6, 0) * 4
    ffn = FfnWeights(gate, gate.clone(), torch.randn(HIDDEN, 24), torch.ones(HIDDEN))
    partition = replace(make_partition("plain"), experts=np.arange(24).reshape(EXPERTS, 6))
    truth = torch.arange(400) % EXPERTS
    inputs = make_inputs(400)
    inputs.x_TH.copy_(direction[truth] * 2 + 0.1 * torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(1)))
    rows = Ridge().rows(ffn, partition, make_context(make_moe(ffn, partition), inputs))
    assert torch.equal((inputs.x_TH @ rows.T).argmax(1), truth)


def test_refit_uses_the_repaired_weights() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    context, router = make_context(moe, inputs), Ridge()
    torch.testing.assert_close(router.refit(moe, ffn, context), router.rows(ffn, moe.partition, context))
    weights = replace(moe.weights, down_HP=moe.weights.down_HP * torch.linspace(0.1, 2, 26))
    moe = replace(moe, weights=weights)
    aim = plain_contributions(weights, moe.partition, inputs.x_TH, "norm")
    aim = np.log(aim / aim.mean(1, keepdims=True) + Ridge.Options().floor)
    aim -= aim.mean(1, keepdims=True)
    expected = stacked(inputs.x_TH.double().numpy(), aim, Ridge.Options().ridge)
    np.testing.assert_allclose(router.refit(moe, ffn, context).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_batches_do_not_matter() -> None:
    ffn, partition = make_ffn(), make_partition()
    a, b = (
        Ridge(Ridge.Options(weighting="residual")).rows(
            ffn, partition, make_context(make_moe(ffn), make_inputs(200, size))
        )
        for size in (7, 1000)
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_token_that_no_expert_serves_has_no_preference() -> None:
    out = centred(log_contribution(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), 0.5))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]) * np.log(5.0))


def test_no_tokens_no_preference() -> None:
    ffn, partition = make_ffn(), make_partition()
    rows = Ridge().rows(ffn, partition, make_context(make_moe(ffn), make_inputs(0)))
    assert torch.equal(rows, torch.zeros(EXPERTS, HIDDEN))


def test_an_activation_that_is_no_number_names_the_layer() -> None:
    ffn, partition, inputs = make_ffn(), make_partition(), make_inputs()
    inputs.x_TH[5, 2] = float("nan")
    with pytest.raises(LlamaMoeError, match="layer 3"):
        Ridge().rows(ffn, partition, make_context(make_moe(ffn), inputs))
