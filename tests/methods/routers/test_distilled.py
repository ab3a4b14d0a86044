"""The distilled router: its teacher against all subsets, its loss by differences, and planted choices."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.routers.distilled import Distilled, held_out_errors
from llamamoe.methods.routers.ridge import Ridge
from llamamoe.methods.solvers.choice_loss import ChoiceProblem, weighted_gram
from llamamoe.methods.solvers.greedy_choices import best_choices, greedy_choices, scalar_products
from tests.converted import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    make_context,
    make_ffn,
    make_inputs,
    make_moe,
    make_partition,
    plain_dense,
    plain_hidden,
)


def products(outputs_BNH: torch.Tensor, aim_BH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs_BNH @ outputs_BNH.transpose(1, 2), (outputs_BNH @ aim_BH[:, :, None])[:, :, 0]


def errors(
    outputs_NH: torch.Tensor, aim_H: torch.Tensor, coefficient: float, top_k: int
) -> dict[frozenset[int], float]:
    """The squared error of every subset of k experts."""
    sets = combinations(range(len(outputs_NH)), top_k)
    return {frozenset(s): float((aim_H - coefficient * outputs_NH[list(s)].sum(0)).square().sum()) for s in sets}


@pytest.mark.parametrize("coefficient", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_greedy_choice_is_the_best_of_orthogonal_experts(coefficient: float, top_k: int) -> None:
    g = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn(12, 7, 7, generator=g, dtype=torch.float64)).Q[:, :5]
    outputs = frames * torch.rand(12, 5, 1, generator=g).double()
    aim = torch.randn(12, 7, generator=g).double()
    chosen, gain = greedy_choices(*products(outputs, aim), coefficient, top_k)
    for out, y, taken, won in zip(outputs, aim, chosen, gain, strict=True):
        all_errors = errors(out, y, coefficient, top_k)
        best = min(all_errors, key=all_errors.get)
        assert frozenset(taken.nonzero().flatten().tolist()) == best
        assert float(y @ y - won) == pytest.approx(all_errors[best])


def test_greedy_choice_is_near_the_best_otherwise_and_follows_its_rule() -> None:
    g = torch.Generator().manual_seed(1)
    outputs, aim = torch.randn(40, 6, 8, generator=g).double(), torch.randn(40, 8, generator=g).double()
    aim = aim + outputs.sum(1)
    chosen, gain = greedy_choices(*products(outputs, aim), 1.0, 3)
    total = best = chance = 0.0
    for out, y, taken, won in zip(outputs, aim, chosen, gain, strict=True):
        rest, expected = y.clone(), []
        for _ in range(3):
            left = [i for i in range(6) if i not in expected]
            expected.append(min(left, key=lambda i: float((rest - out[i]).square().sum())))
            rest = rest - out[expected[-1]]
        assert sorted(expected) == taken.nonzero().flatten().tolist()
        assert float(y @ y - won) == pytest.approx(float(rest @ rest))
        every = errors(out, y, 1.0, 3)
        total, best, chance = (
            total + float(rest @ rest),
            best + min(every.values()),
            chance + np.mean([*every.values()]),
        )
    assert total - best < 0.2 * (chance - best)


@pytest.mark.parametrize("kind", ["padded", "overlap", "plain"])
def test_scalar_products_of_the_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamamoe.methods.solvers.greedy_choices.FLOATS_AT_ONCE", 300)
    ffn, inputs = make_ffn(), make_inputs(50, 20)
    moe = make_moe(ffn, make_partition(kind))
    moe = replace(moe, weights=replace(moe.weights, down_HP=moe.weights.down_HP * 0.7))
    parts = list(scalar_products(moe, ffn, inputs))
    assert len(parts) > 3
    gram, cross = (torch.cat(p).double().numpy() for p in zip(*parts, strict=True))
    h, down = plain_hidden(moe.weights.gate_PH, moe.weights.up_PH, inputs.x_TH), moe.weights.down_HP.double().numpy()
    shared, width = len(moe.partition.shared), moe.partition.experts.shape[1]
    rest = plain_dense(ffn, inputs.x_TH) - h[:, :shared] @ down[:, :shared].T
    places = [slice(shared + i * width, shared + (i + 1) * width) for i in range(EXPERTS)]
    outputs = np.stack([h[:, p] @ down[:, p].T for p in places], 1)
    np.testing.assert_allclose(gram, np.einsum("tnh,tmh->tnm", outputs, outputs), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(cross, np.einsum("tnh,th->tn", outputs, rest), rtol=1e-3, atol=1e-3)
    found = best_choices(moe, ffn, inputs)
    assert found.chosen_TN.sum(1).eq(TOP_K).all()
    np.testing.assert_allclose(found.norm_TN.numpy(), (outputs**2).sum(2), rtol=1e-3, atol=1e-3)


def problem(loss: str = "logistic", decay: float = 1e-3, noise: float = 0.0, tokens: int = 300) -> ChoiceProblem:
    """Choices that are linear in x, but for noise; every fifth token is held out, weights differ."""
    inputs = make_inputs(tokens)
    g = torch.Generator().manual_seed(3)
    logits = inputs.x_TH @ planted_rows().T + noise * torch.randn(tokens, EXPERTS, generator=g)
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(TOP_K, 1).indices, 1.0).bool()
    held_out = (torch.arange(tokens) % 5 == 4).float()
    weight = torch.linspace(0.5, 2, tokens)
    return ChoiceProblem(inputs, chosen, weight * (1 - held_out), weight * held_out, loss, decay)


def planted_rows() -> torch.Tensor:
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_loss_written_out_and_its_gradient_by_differences(loss: str) -> None:
    p, g = problem(loss, tokens=30), torch.Generator().manual_seed(5)
    rows = 0.5 * torch.randn(EXPERTS, HIDDEN, generator=g).double()
    fitted, held_out, gradient = p.sweep(rows)

    def plain(rows: np.ndarray, weights: np.ndarray, decay: float) -> float:
        total, x = 0.0, p.inputs.x_TH.double().numpy()
        for t, chosen in enumerate(p.chosen_TN.numpy()):
            logits = rows @ x[t]
            if loss == "softmax":
                value = -np.log(np.exp(logits) / np.exp(logits).sum())[chosen].sum()
            else:  # largest <z, l> + entropy(z) over z of sum k, minus the choice's own <A, l>
                grid = np.linspace(-40, 40, 80001)
                sums = (1 / (1 + np.exp(grid[:, None] - logits))).sum(1)
                z = 1 / (1 + np.exp(grid[np.abs(sums - TOP_K).argmin()] - logits))
                value = z @ logits - (z * np.log(z) + (1 - z) * np.log(1 - z)).sum() - logits[chosen].sum()
            total += weights[t] * value
        return total / weights.sum() + decay * (rows**2).sum() / 2

    weight, other = p.weight_T.double().numpy(), p.held_out_T.double().numpy()
    square = (p.inputs.x_TH.double().square().mean(1).numpy() * weight).sum() / weight.sum()
    assert fitted == pytest.approx(plain(rows.numpy(), weight, 1e-3 * square), rel=1e-3)
    assert held_out == pytest.approx(plain(rows.numpy(), other, 0.0), rel=1e-3)
    toward = torch.randn(EXPERTS, HIDDEN, generator=g).double()
    ends = [p.sweep(rows + e * toward)[0] for e in (1e-2, -1e-2)]
    assert float((gradient * toward).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-3)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_the_solver_ends_at_the_optimum(loss: str) -> None:
    p = problem(loss, decay=0.05, noise=1.0, tokens=100)
    p = replace(p, held_out_T=p.weight_T)
    rows, history = p.solve(torch.zeros(EXPERTS, HIDDEN), 150, 150)
    start, end = (p.sweep(r.double())[2].norm() for r in (torch.zeros(EXPERTS, HIDDEN), rows))
    assert end < 2e-2 * start
    assert history[1] < history[0]
    assert min(history) == pytest.approx(p.sweep(rows.double())[0], rel=1e-2)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_planted_choices_are_learned(loss: str) -> None:
    p = problem(loss, decay=1e-6)
    rows, _ = p.solve(torch.zeros(EXPERTS, HIDDEN), 60, 5)
    found = (p.inputs.x_TH @ rows.T).topk(TOP_K, 1).indices
    assert p.chosen_TN.gather(1, found).float().mean() > 0.9


def test_weighted_sums() -> None:
    inputs, g = make_inputs(30, 7), torch.Generator().manual_seed(0)
    weight, aim = torch.rand(30, generator=g), torch.randn(30, 3, generator=g)
    x = inputs.x_TH.double().numpy()
    gram, cross = weighted_gram(inputs, weight, aim)
    share = (weight / weight.sum()).double().numpy()
    np.testing.assert_allclose(gram.numpy(), (x.T * share) @ x, rtol=1e-5)
    np.testing.assert_allclose(cross.numpy(), (x.T * share) @ aim.double().numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("importance", ["equal", "gain"])
@pytest.mark.parametrize("weighting", ["none", "residual"])
def test_never_worse_than_ridge_on_the_held_out_tokens(importance: str, weighting: str) -> None:
    from llamamoe.methods.solvers.normal_equations import held_out_tokens

    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    router = Distilled(Distilled.Options(importance=importance, weighting=weighting, iterations=10))
    rows, ridge = (r.rows(ffn, moe.partition, make_context(moe, inputs)) for r in (router, Ridge()))
    if not torch.allclose(rows, ridge, rtol=1e-4, atol=1e-5):  # else ridge has won
        candidates = [replace(moe, router_NH=r) for r in (rows, ridge)]
        ours, theirs = held_out_errors(candidates, ffn, inputs, held_out_tokens(inputs.num_tokens), weighting)
        assert ours < theirs * 1.05  # ridge has seen these tokens here


def test_errors_of_the_held_out_tokens() -> None:
    ffn, inputs = make_ffn(), make_inputs(40, 9)
    moe = make_moe(ffn)
    some = torch.arange(40) % 3 == 0
    y = plain_dense(ffn, inputs.x_TH)
    other = torch.cat(list(moe.outputs(inputs))).double().numpy()
    scale = 1 / inputs.residual_scale_T.double().numpy()
    scale /= np.sqrt((scale**2).mean())
    expected = (((y - other) * scale[:, None])[some.numpy()] ** 2).sum()
    assert held_out_errors([moe], ffn, inputs, some, "residual")[0] == pytest.approx(expected, rel=1e-4)


def test_refit_uses_the_repaired_weights_and_their_coefficient() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    context, router = make_context(moe, inputs), Distilled(Distilled.Options(iterations=8))
    rows = router.rows(ffn, moe.partition, context)
    torch.testing.assert_close(router.refit(moe, ffn, context), rows)
    changed = replace(moe, weights=replace(moe.weights, down_HP=moe.weights.down_HP * torch.linspace(0.1, 2, 26)))
    assert not torch.allclose(router.refit(changed, ffn, context), rows, rtol=1e-2)
    half = best_choices(replace(moe, factor=moe.factor / 4), ffn, inputs)
    assert not torch.equal(half.chosen_TN, best_choices(moe, ffn, inputs).chosen_TN)


def test_deterministic_and_batches_do_not_matter() -> None:
    ffn, partition = make_ffn(), make_partition()
    first, again, other = (
        Distilled(Distilled.Options(iterations=8)).rows(
            ffn, partition, make_context(make_moe(ffn), make_inputs(150, b))
        )
        for b in (64, 64, 7)
    )
    assert torch.equal(first, again)
    torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 4, 6])
def test_few_tokens(tokens: int) -> None:
    ffn, partition = make_ffn(), make_partition()
    rows = Distilled().rows(ffn, partition, make_context(make_moe(ffn), make_inputs(tokens)))
    assert rows.shape == (EXPERTS, HIDDEN)
    assert rows.isfinite().all()


def test_an_activation_that_is_no_number_names_the_layer() -> None:
    ffn, partition, inputs = make_ffn(), make_partition(), make_inputs()
    inputs.x_TH[5, 2] = float("nan")
    with pytest.raises(LlamaMoeError, match="layer 3"):
        Distilled().rows(ffn, partition, make_context(make_moe(ffn), inputs))


def test_registered() -> None:
    assert ROUTERS.get("distilled") is Distilled
    assert Distilled.exportable
