"""Learned assignment: its gradients by differences, its promises, and a layer whose experts are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.methods.layer import PADDING, FfnWeights, Partition, token_scales
from llamamoe.methods.routers.hidden_centroid import HiddenCentroid
from llamamoe.methods.solvers.balance import assign_balanced
from llamamoe.methods.solvers.learned_assignment import (
    Learner,
    LearningOptions,
    RoutedNeurons,
    first_logits,
    hard_top_k,
    mean_error,
    one_hot,
)
from llamamoe.methods.solvers.transport import balanced_transport, soft_top_k
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.methods.splitters.learned import Learned, labels_of

from .calibrated import layer_context, layer_inputs, plain_hidden, random_ffn, random_inputs

NONE = np.empty(0, np.int64)
CPU = torch.device("cpu")
QUICK = Learned.Options(steps=6, batch=16, refresh=2, checks=2)


def routed(size: int = 12, tokens: int = 30) -> tuple[RoutedNeurons, FfnWeights]:
    """All neurons of a random layer, tokens of different scales."""
    ffn, inputs = random_ffn(size), random_inputs(tokens)
    inputs = replace(inputs, residual_scale_T=torch.linspace(0.5, 2, tokens))
    part = RoutedNeurons.of(ffn, np.arange(size), inputs, token_scales(inputs, "residual"))
    return part, ffn


def learner(part: RoutedNeurons, labels: np.ndarray, options: LearningOptions) -> Learner:
    """Four experts of three, two selected."""
    g = torch.Generator().manual_seed(5)
    context = layer_context(part.inputs, 3)
    return Learner(
        part, context, options, torch.randn(12, 4, generator=g), torch.randn(4, 8, generator=g), 2.0, g, labels
    )


def test_error_is_that_of_the_layer_written_out() -> None:
    part, ffn = routed()
    labels = np.arange(12) % 4
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    x, h = part.inputs.x_TH, plain_hidden(ffn, part.inputs.x_TH)
    down, total = ffn.down_HF.double().numpy(), []
    scales = 1 / part.inputs.residual_scale_T.double().numpy()
    scales /= np.sqrt((scales**2).mean())
    for t in range(10, 30):
        chosen = sorted(range(4), key=lambda i: -float(rows[i] @ x[t]))[:2]
        converted = sum(h[t, j] * down[:, j] for j in range(12) if labels[j] in chosen)
        total.append(scales[t] ** 2 * ((down @ h[t] - converted) ** 2).sum())
    assert mean_error(part, labels, rows, 2, torch.arange(10, 30)) == pytest.approx(np.mean(total), rel=1e-4)


@pytest.mark.parametrize("balance", [0.0, 0.7])
def test_straight_through_gradients_by_differences(balance: float) -> None:
    """Of the loss along straight lines from the hard choices to their neighbours, as a function of the soft ones."""
    part, _ = routed()
    labels = np.arange(12) % 4
    state = learner(part, labels, LearningOptions(sinkhorn_iterations=200, balance=balance))
    tokens, tau = torch.arange(30), 0.8
    loss = state.gradients(tokens, tau)

    x, h = part.tokens(tokens)
    rows, logits = state.rows_NH.detach(), state.logits_RN.detach()
    hard = hard_top_k(x @ rows.T, 2)
    assignment, selection = one_hot(labels, 4, CPU).requires_grad_(), hard.clone().requires_grad_()
    value = (
        part.errors(h, selection, assignment).mean() / 2 + balance * 4 * (hard.mean(0) / 2 * selection.mean(0)).sum()
    )
    value.backward()
    selection.grad += part.switching_errors(h, hard, labels) / 60
    assignment.grad += part.moving_errors(h, hard, labels) / 60
    assert loss == pytest.approx(value.item(), rel=1e-4)
    temperature = 0.5 * (x @ rows.T - (x @ rows.T).mean(1, keepdim=True)).double().square().mean().sqrt()

    def soft(rows: torch.Tensor, logits: torch.Tensor) -> float:
        z = soft_top_k(x.double() @ rows.T / temperature, 2)
        plan, _ = balanced_transport(logits, tau, 200)
        return float((z * selection.grad.double()).sum() + (plan * assignment.grad.double()).sum())

    g = torch.Generator().manual_seed(7)
    for _ in range(3):
        toward = torch.randn(4, 8, generator=g).double(), torch.randn(12, 4, generator=g).double()
        ends = [soft(rows.double() + e * toward[0], logits.double() + e * toward[1]) for e in (1e-4, -1e-4)]
        slope = sum(float((p.grad.double() * d).sum()) for p, d in zip((state.rows_NH, state.logits_RN), toward, strict=True))  # fmt: skip
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_slopes_are_what_single_moves_change(seed: int) -> None:
    """One neuron in another expert, or one more or one less expert of a token: the loss computed anew."""
    part, _ = routed()
    rng, tokens = np.random.default_rng(seed), torch.arange(30)
    labels = rng.permutation(np.arange(12) % 4)
    _, h = part.tokens(tokens)
    hard = hard_top_k(torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)), 2)
    assignment, selection = one_hot(labels, 4, CPU).requires_grad_(), hard.clone().requires_grad_()
    before = part.errors(h, selection, assignment)
    before.sum().backward()
    before, near = before.detach(), 1e-5 * float(before.sum().detach())
    moving = assignment.grad + part.moving_errors(h, hard, labels)
    switching = selection.grad + part.switching_errors(h, hard, labels)
    for j, c in np.ndindex(12, 4):
        moved = labels.copy()
        moved[j] = c
        change = float((part.errors(h, hard, one_hot(moved, 4, CPU)) - before).sum())
        assert float(moving[j, c] - moving[j, labels[j]]) == pytest.approx(change, rel=1e-3, abs=near)
    for t, c in np.ndindex(30, 4):
        other = hard.clone()
        other[t, c] = 1 - other[t, c]
        change = float((part.errors(h, other, one_hot(labels, 4, CPU)) - before).sum())
        assert float(switching[t, c] * (1 - 2 * hard[t, c])) == pytest.approx(change, rel=1e-3, abs=near)


def test_first_logits_stand_for_the_first_labels() -> None:
    rng = np.random.default_rng(0)
    power = rng.lognormal(sigma=3, size=(20, 5))
    power[3] = 0
    labels = assign_balanced(-power, 4)
    logits = first_logits(power, labels, CPU)
    assert logits.isfinite().all()
    assert np.array_equal(assign_balanced(-logits.double().numpy(), 4), labels)


def test_labels_of_a_partition() -> None:
    neurons, labels = np.array([1, 2, 4, 5, 7]), np.array([2, 0, 1, 0, 2])
    partition = Partition.from_labels(neurons, labels, layer_context(None, 3, 4), np.array([0, 3, 6]))
    assert np.array_equal(labels_of(partition, neurons), labels)


@settings(max_examples=8)
@given(st.integers(1, 20), st.integers(2, 5), st.integers(0, 2), st.integers(0, 6), st.integers(3, 40))
def test_each_neuron_once(size: int, experts: int, spare: int, shared: int, tokens: int) -> None:
    shared = min(shared, size)
    width = -(-(size - shared) // experts) + spare
    chosen = np.sort(np.random.default_rng(size).choice(size, shared, replace=False)).astype(np.int64)
    context = layer_context(random_inputs(tokens), max(width, 1), experts, 1)
    partition = Learned(QUICK).split(random_ffn(size), chosen, context)
    partition.check(size)
    assert np.array_equal(partition.shared, chosen)
    assert (partition.experts != PADDING).sum() == size - shared
    assert partition.router_NH is not None
    assert partition.router_NH.shape == (experts, 8)
    assert partition.router_NH.isfinite().all()


def planted(seed: int = 0) -> tuple[FfnWeights, torch.Tensor]:
    """Tokens of two of eight kinds at a time; a neuron answers to one kind, far more strongly to some tokens."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.arange(32) % 8
    gate = 3 * torch.eye(8, 16)[kind] + 0.3 * torch.randn(32, 16, generator=g)
    up = torch.eye(8, 16)[kind] + 0.3 * torch.randn(32, 16, generator=g)
    two = torch.rand(600, 8, generator=g).argsort(1)[:, :2]
    x = torch.zeros(600, 16).scatter_(1, two, 1.0) + 0.2 * torch.randn(600, 16, generator=g)
    return FfnWeights(gate, up, torch.randn(16, 32, generator=g), torch.ones(16)), x


def held_out_error(partition: Partition, ffn: FfnWeights, x: torch.Tensor) -> float:
    part = RoutedNeurons.of(ffn, np.arange(32), layer_inputs(x), None)
    assert partition.router_NH is not None
    return mean_error(part, labels_of(partition, np.arange(32)), partition.router_NH, 2, torch.arange(500, 600))


def test_a_bad_start_is_led_to_the_planted_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From experts that mix two kinds each and a router that knows nothing of them."""
    ffn, x = planted()
    context = layer_context(layer_inputs(x[:500]), 4, 8)
    labels = np.arange(32) % 8
    labels[:16] = labels[:16] ^ 1
    rows = 0.1 * torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    start = replace(Partition.from_labels(np.arange(32), labels, context, NONE), router_NH=rows)
    monkeypatch.setattr(Learned, "_start", lambda *_: start)
    options = Learned.Options(steps=120, batch=200, lr_router=0.1, lr_assignment=0.1, refresh=5)
    found = Learned(options).split(ffn, NONE, context)
    assert held_out_error(found, ffn, x) < 0.5 * held_out_error(start, ffn, x)


def test_never_worse_than_its_start_on_the_held_out_tokens() -> None:
    """Rates that destroy everything: the start is what comes back."""
    ffn, x = planted()
    context = layer_context(layer_inputs(x[:200]), 4, 8)
    wild = Learned(Learned.Options(steps=4, batch=8, lr_assignment=1e3, lr_router=1e4, checks=1))
    start, found = wild._start(ffn, NONE, context), wild.split(ffn, NONE, context)
    assert np.array_equal(found.experts, start.experts)
    assert start.router_NH is not None
    assert torch.equal(found.router_NH, start.router_NH)


def test_same_seed_same_result_and_batches_do_not_matter() -> None:
    ffn = random_ffn(16)
    first, again, other = (
        Learned(QUICK).split(ffn, NONE, layer_context(random_inputs(60, batch_tokens=batch), 4))
        for batch in (4096, 4096, 7)
    )
    assert np.array_equal(first.experts, again.experts)
    assert torch.equal(first.router_NH, again.router_NH)
    assert np.array_equal(first.experts, other.experts)
    torch.testing.assert_close(first.router_NH, other.router_NH, rtol=1e-3, atol=1e-3)


def test_the_learned_rows_are_the_default_routers() -> None:
    ffn, context = random_ffn(16), layer_context(random_inputs(), 4)
    partition = Learned(QUICK).split(ffn, NONE, context)
    assert SPLITTERS.get("learned") is Learned
    assert Learned.default_router == HiddenCentroid.name
    assert torch.equal(HiddenCentroid().rows(ffn, partition, context), partition.router_NH)
