"""Token clusters against plain loops, a brute-force optimum and a planted problem."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.methods.layer import FfnWeights, LayerInputs
from llamamoe.methods.splitters.base import routed_neurons
from llamamoe.methods.splitters.token_clusters import TokenClusters, captured_power, spherical_kmeans
from tests.methods.splitters.calibrated import layer_context, layer_inputs, plain_hidden, random_ffn, random_inputs


def planted(groups: int = 4, per_group: int = 3, tokens: int = 60) -> tuple[FfnWeights, LayerInputs, np.ndarray]:
    """Tokens of ``groups`` kinds, one axis each; the neurons of a group fire on its kind only, in shuffled places."""
    g = torch.Generator().manual_seed(0)
    kind = torch.arange(tokens) % groups
    x = 4 * torch.nn.functional.one_hot(kind, groups).float() + 0.05 * torch.randn(tokens, groups, generator=g)
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(groups), per_group))
    gate = torch.nn.functional.one_hot(torch.from_numpy(owner), groups).float() * 2 - 1
    down = torch.randn(groups, len(owner), generator=g)
    return FfnWeights(gate, gate.clone().abs(), down, torch.ones(groups)), layer_inputs(x), owner


@given(st.integers(0, 3), st.integers(2, 5), st.integers(0, 6), st.integers(0, 2))
@settings(max_examples=20)
def test_every_neuron_once(seed: int, num_experts: int, num_shared: int, rounds: int) -> None:
    ffn, shared = random_ffn(seed=seed), np.arange(0, 2 * num_shared, 2)
    width = -(-(24 - num_shared) // num_experts)
    context = layer_context(random_inputs(seed=seed), width, num_experts, min(2, num_experts), seed)
    partition = TokenClusters(TokenClusters.Options(rounds=rounds)).split(ffn, shared, context)
    partition.check(24)
    assert partition.experts.shape == (num_experts, width)
    assert partition.shared.tolist() == shared.tolist()
    assert partition.router_NH is not None
    assert partition.router_NH.shape == (num_experts, 8)


def test_planted_groups_are_found_and_the_rows_route_to_them() -> None:
    ffn, inputs, owner = planted()
    for rounds in (0, 2):
        context = layer_context(inputs, 3, 4, 1)
        partition = TokenClusters(TokenClusters.Options(rounds=rounds)).split(ffn, np.empty(0, np.int64), context)
        found = [set(owner[row]) for row in partition.experts]
        assert sorted(map(tuple, found)) == [(0,), (1,), (2,), (3,)]
        assert partition.router_NH is not None
        if rounds:  # rows without the mean taken away must find the experts themselves
            chosen = (inputs.x_TH @ partition.router_NH.T).argmax(1)
            assert all(found[e] == {int(t) % 4} for t, e in enumerate(chosen))


def test_captured_power_written_out() -> None:
    ffn, inputs = random_ffn(), random_inputs(30, batch_tokens=7)
    shared = np.array([1, 4])
    neurons = routed_neurons(24, shared)
    context = layer_context(inputs, 6, 4, 2)
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    scales = torch.rand(30, generator=torch.Generator().manual_seed(4))
    got = captured_power(ffn, neurons, (logits[b] for b in inputs.batches()), scales, context)
    hidden, down = plain_hidden(ffn, inputs.x_TH), ffn.down_HF.double().numpy()
    want = np.zeros((22, 4))
    for t in range(30):
        for c in sorted(range(4), key=lambda i: -float(logits[t, i]))[:2]:
            for r, j in enumerate(neurons):
                want[r, c] += float(scales[t]) ** 2 * hidden[t, j] ** 2 * float(np.square(down[:, j]).sum())
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_the_assignment_is_the_best_of_all() -> None:
    """8 neurons in 2 experts: all 70 partitions tried, for the selection of the first step."""
    ffn, inputs = random_ffn(8, 4), random_inputs(25, 4)
    context = layer_context(inputs, 4, 2, 1)
    partition = TokenClusters(TokenClusters.Options(rounds=0)).split(ffn, np.empty(0, np.int64), context)
    centroids, mean = spherical_kmeans(context, 15)
    near = ((inputs.x_TH - mean) @ centroids.T).argmax(1).numpy()
    hidden = plain_hidden(ffn, inputs.x_TH)
    power = np.square(hidden) * np.square(ffn.down_HF.double().numpy()).sum(0)

    def captured(first: tuple[int, ...]) -> float:
        rest = [j for j in range(8) if j not in first]
        return float(power[near == 0][:, list(first)].sum() + power[near == 1][:, rest].sum())

    best = max(captured(first) for first in itertools.combinations(range(8), 4))
    assert abs(captured(tuple(partition.experts[0])) - best) <= 1e-6 * best


def test_results_do_not_hang_on_the_batches() -> None:
    ffn, none = random_ffn(), np.empty(0, np.int64)
    one, other = (
        TokenClusters().split(ffn, none, layer_context(random_inputs(100, batch_tokens=b), 6)) for b in (4096, 13)
    )
    assert one.experts.tolist() == other.experts.tolist()
    assert one.router_NH is not None
    assert other.router_NH is not None
    torch.testing.assert_close(one.router_NH, other.router_NH, rtol=1e-3, atol=1e-4)


def test_rounds_capture_more() -> None:
    ffn, inputs = random_ffn(48, 8), random_inputs(400)
    held = []
    for rounds in (0, 3):
        context = layer_context(inputs, 6, 8, 2)
        partition = TokenClusters(TokenClusters.Options(rounds=rounds)).split(ffn, np.empty(0, np.int64), context)
        labels = np.empty(48, np.int64)
        for e, row in enumerate(partition.experts):
            labels[row] = e
        rows = TokenClusters()._fit(ffn, partition, context)
        logits = (x.float() @ rows.T for x in inputs.inputs())
        held.append(captured_power(ffn, np.arange(48), logits, None, context)[np.arange(48), labels].sum())
    assert held[1] > held[0]


def test_fewer_tokens_than_experts() -> None:
    context = layer_context(random_inputs(3), 3, 8, 2)
    TokenClusters().split(random_ffn(), np.empty(0, np.int64), context).check(24)
