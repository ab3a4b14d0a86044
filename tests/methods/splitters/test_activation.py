"""CMoE's split against its formulas written out with dense matrices, and on layers whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import PADDING, FfnWeights
from llamamoe.methods.markers import (
    MarkerOptions,
    activation_markers,
    activation_rates,
    every_nth,
    mean_patterns,
    pattern_distances,
)
from llamamoe.methods.selectors.rate import Rate
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.methods.splitters.activation import Activation, cluster_markers

from .calibrated import layer_context, layer_inputs, plain_hidden, random_ffn, random_inputs

NONE = np.empty(0, np.int64)


def plain_markers(ffn: FfnWeights, x_TH: torch.Tensor, k_act: int, normalised: bool) -> np.ndarray:
    """A [T, F], token by token."""
    if normalised:
        unit = [w / w.norm(dim=1, keepdim=True) for w in (ffn.gate_FH, ffn.up_FH, x_TH)]
        ffn, x_TH = FfnWeights(unit[0], unit[1], ffn.down_HF, ffn.norm_H), unit[2]
    h = np.abs(plain_hidden(ffn, x_TH))
    marks = np.zeros_like(h)
    for t, row in enumerate(h):
        for j in sorted(range(len(row)), key=lambda j: -row[j])[:k_act]:
            marks[t, j] = 1
    return marks


def plain_distances(marks: np.ndarray, patterns: np.ndarray, kind: str) -> np.ndarray:
    """[F, K], pair by pair."""
    norm = {"l1": lambda d: np.abs(d).sum(), "l2": lambda d: np.sqrt((d**2).sum())}[kind]
    return np.array([[norm(column - pattern) for pattern in patterns.T] for column in marks.T])


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("k_act", [1, 5, 99])
def test_markers_and_rates(normalised: bool, k_act: int) -> None:
    ffn, inputs = random_ffn(), random_inputs(batch_tokens=7)
    ffn.gate_FH.mul_(torch.logspace(-1, 1, 24)[:, None])
    options = MarkerOptions(k_act=k_act, normalised=normalised)
    markers = activation_markers(ffn, layer_context(inputs, 6), options)
    plain = plain_markers(ffn, inputs.x_TH, k_act, normalised)
    assert np.array_equal(markers.toarray(), plain)
    np.testing.assert_allclose(activation_rates(markers), plain.mean(0))
    chosen = Rate(Rate.Options(k_act=k_act, normalised=normalised)).scores(ffn, layer_context(inputs, 6))
    np.testing.assert_allclose(chosen, plain.mean(0))


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_distances_to_columns_and_means(kind: str) -> None:
    markers = activation_markers(random_ffn(), layer_context(random_inputs(), 6), MarkerOptions(k_act=6))
    marks = markers.toarray()
    sets = [np.array([0, 3, 4]), np.array([7]), NONE]
    patterns = mean_patterns(markers, sets)
    np.testing.assert_allclose(patterns[:, 0], marks[:, [0, 3, 4]].mean(1))
    assert not patterns[:, 2].any()
    np.testing.assert_allclose(
        pattern_distances(markers, patterns, kind), plain_distances(marks, patterns, kind), atol=1e-7
    )


def test_subsample_is_a_stride_over_all_tokens() -> None:
    inputs = random_inputs(tokens=10)
    assert every_nth(inputs, 10) is inputs
    assert torch.equal(every_nth(inputs, 4).x_TH, inputs.x_TH[[0, 3, 6, 9]])
    assert every_nth(inputs, 9).num_tokens == 5


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_single_pass_is_cmoe(kind: str) -> None:
    """Initial centroids by rate, each repeated W times, one linear assignment."""
    ffn, inputs, num_experts, width = random_ffn(size=30), random_inputs(tokens=60), 4, 6
    options = Activation.Options(k_act=5, distance=kind)
    context = layer_context(inputs, width, num_experts)
    shared = Rate(Rate.Options(k_act=5)).select(ffn, 6, context)
    partition = Activation(options).split(ffn, shared, context)
    partition.check(30)

    marks = plain_markers(ffn, inputs.x_TH, 5, True)
    rates = marks.mean(0)
    assert rates[shared].min() >= np.delete(rates, shared).max()
    routed = np.setdiff1d(np.arange(30), shared)
    top = sorted(routed, key=lambda j: (-rates[j], j))[:num_experts]
    cost = plain_distances(marks[:, routed], marks[:, top], kind)
    rows, columns = scipy.optimize.linear_sum_assignment(np.repeat(cost, width, axis=1))
    ours = sum(cost[np.searchsorted(routed, expert), i].sum() for i, expert in enumerate(partition.experts))
    assert ours == pytest.approx(np.repeat(cost, width, axis=1)[rows, columns].sum())


def planted(groups: int = 4, size: int = 24, seed: int = 0) -> tuple[FfnWeights, torch.Tensor, np.ndarray]:
    """Tokens of ``groups`` kinds; a neuron answers to one kind, some of them far more often than others."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randperm(size, generator=generator) % groups
    gate = 3 * torch.eye(groups, 8)[truth] + 0.05 * torch.randn(size, 8, generator=generator)
    up = torch.eye(groups, 8)[truth] + 0.05 * torch.randn(size, 8, generator=generator)
    kind = torch.arange(200) % groups
    x = torch.eye(groups, 8)[kind] + 0.05 * torch.randn(200, 8, generator=generator)
    return FfnWeights(gate, up, torch.randn(8, size, generator=generator), torch.ones(8)), x, truth.numpy()


def test_iterations_find_planted_groups() -> None:
    """The neurons of highest rate may lie in one group: the single pass cannot get away from that, iterations can."""
    recovered = {1: 0, 20: 0}
    for seed in range(6):
        ffn, x, truth = planted(seed=seed)
        for iterations in recovered:
            splitter = Activation(Activation.Options(k_act=5, iterations=iterations, distance="l2"))
            partition = splitter.split(ffn, NONE, layer_context(layer_inputs(x), 6))
            partition.check(24)
            recovered[iterations] += all(len(set(truth[expert])) == 1 for expert in partition.experts)
    assert recovered[20] > recovered[1]


def test_known_clusters_around_the_most_active() -> None:
    """With one neuron of each group made the most active of it, the single pass is right."""
    marks = np.zeros((80, 12))
    for j in range(12):
        marks[np.arange(80) % 4 == j % 4, j] = 1
        marks[: 4 * (j // 4), j] = 0  # later ones are marked less often
    labels = cluster_markers(scipy.sparse.csr_array(marks), 4, 3, "l1", 1)
    assert len({(label, j % 4) for j, label in enumerate(labels)}) == 4


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_iterating_never_ends_farther_from_the_means(distance: str) -> None:
    markers = activation_markers(
        random_ffn(size=40), layer_context(random_inputs(tokens=80), 8), MarkerOptions(k_act=6)
    )

    def total(labels: np.ndarray) -> float:
        means = mean_patterns(markers, [np.flatnonzero(labels == c) for c in range(5)])
        return float(plain_distances(markers.toarray(), means, distance)[np.arange(40), labels].sum())

    totals = [total(cluster_markers(markers, 5, 8, distance, iterations)) for iterations in (1, 2, 4, 8, 50)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(totals))
    assert totals[-1] < totals[0]


@settings(max_examples=30)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 9),
    st.sampled_from(["l1", "l2"]),
)
def test_each_neuron_once(size: int, experts: int, spare: int, iterations: int, shared: int, kind: str) -> None:
    shared = min(shared, size)
    width = -(-(size - shared) // experts) + spare
    ffn, inputs = random_ffn(size=size), random_inputs(tokens=9)
    chosen = np.sort(np.random.default_rng(size).choice(size, shared, replace=False)).astype(np.int64)
    options = Activation.Options(k_act=3, iterations=iterations, distance=kind)
    partition = Activation(options).split(ffn, chosen, layer_context(inputs, width, experts, 1))
    partition.check(size)
    assert np.array_equal(partition.shared, chosen)
    assert partition.experts.shape == (experts, width)
    assert (partition.experts != PADDING).sum() == size - shared


@pytest.mark.parametrize("iterations", [1, 5])
def test_batch_size_changes_nothing(iterations: int) -> None:
    ffn = random_ffn(size=30)
    splitter = Activation(Activation.Options(k_act=4, iterations=iterations, max_tokens=25))
    first, *others = (
        splitter.split(ffn, NONE, layer_context(random_inputs(tokens=60, batch_tokens=batch), 8))
        for batch in (4096, 60, 7, 1)
    )
    assert all(np.array_equal(first.experts, other.experts) for other in others)


def test_low_precision_weights_and_dead_neurons() -> None:
    ffn = random_ffn(size=24, dtype=torch.bfloat16)
    ffn.gate_FH[:12] = 0
    Activation().split(ffn, NONE, layer_context(random_inputs(), 6)).check(24)


def test_nan_names_the_layer() -> None:
    inputs = random_inputs()
    inputs.x_TH[3, 2] = torch.nan
    with pytest.raises(LlamaMoeError, match="layer 17"):
        Activation().split(random_ffn(), NONE, layer_context(inputs, 6, layer=17))


def test_defaults_are_cmoe() -> None:
    assert SPLITTERS.get("activation") is Activation
    assert Activation().options == Activation.Options(k_act=10, normalised=True, distance="l1", iterations=1)
    assert (Activation.default_shared, Activation.default_shared_by) == (0.25, "rate")
    assert (Activation.default_router, Activation.default_rescale) == ("analytic", "unit")
    assert (Activation.parity, Activation.needs, Activation.default_repair) == ("exact", "activations", None)
    assert Activation.working_bytes(1536, 576) > 4 * 2 * 1536 * 576
