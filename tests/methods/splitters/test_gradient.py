"""The gradient splitter against its formulas, written out plainly and slowly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llamamoe
from llamamoe.calibration.text import CalibrationText
from llamamoe.conversion.defaults import complete
from llamamoe.conversion.texts import with_clusters
from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import PADDING, ExpertWeights, FfnWeights, LayerContext, Partition
from llamamoe.methods.moe_layer import ConvertedFfn
from llamamoe.methods.solvers.allocation import assign_greedily, expected_copies, most_wanted
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.methods.splitters.gradient import Gradient, input_clusters
from tests.methods.splitters.calibrated import layer_context, layer_inputs, plain_hidden, random_ffn, random_inputs

NONE = np.empty(0, np.int64)
OVERLAPS = ("none", "inner", "inter")


def splitter(**options: str) -> Gradient:
    return Gradient(Gradient.Options(**options))


def problem(
    width: int, size: int = 24, experts: int = 4, tokens: int = 40, seed: int = 0, batch: int = 4096, top_k: int = 2
) -> tuple[FfnWeights, LayerContext]:
    """An FFN with inputs, gradients and a cluster for every token."""
    generator = torch.Generator().manual_seed(seed + 7)
    inputs = replace(
        random_inputs(tokens, seed=seed, batch_tokens=batch),
        gradients_TH=torch.randn(tokens, 8, generator=generator),
        clusters_T=torch.randint(0, experts, (tokens,), generator=generator),
    )
    return random_ffn(size, seed=seed), layer_context(inputs, width, experts, top_k, seed)


def plain_importance(ffn: FfnWeights, context: LayerContext, importance: str, kernel: str) -> np.ndarray:
    """float64 [N, F]; dL/dh by autograd of a loss whose gradient at the output is the given one."""
    inputs = context.inputs
    h_TF = torch.from_numpy(plain_hidden(ffn, inputs.x_TH)).requires_grad_()
    loss = ((h_TF @ ffn.down_HF.double().T) * inputs.gradients_TH.double()).sum()
    g_TF, h_TF = torch.autograd.grad(loss, h_TF)[0].numpy(), h_TF.detach().numpy()
    out = np.zeros((context.num_experts, ffn.intermediate_size))
    for c in range(context.num_experts):
        members = [t for t in range(inputs.num_tokens) if inputs.clusters_T[t] == c]
        for j in range(ffn.intermediate_size):
            for t in members:
                value = g_TF[t, j] * (h_TF[t, j] if importance == "feature_change" else 1.0)
                out[c, j] += {"plain": value, "l1_norm": abs(value), "l2_norm": value**2}[kernel] / len(members)
    return out


def plain_greedy(score_NF: np.ndarray, capacity: int) -> list[int]:
    """All pairs in falling order; equal ones by neuron, then by expert."""
    labels = [-1] * score_NF.shape[1]
    room = [capacity] * len(score_NF)
    pairs = itertools.product(range(score_NF.shape[1]), range(len(score_NF)))
    for j, e in sorted(pairs, key=lambda pair: (-score_NF[pair[1], pair[0]], *pair)):
        if labels[j] < 0 and room[e]:
            labels[j] = e
            room[e] -= 1
    return labels


def plain_most_wanted(score_NF: np.ndarray, width: int, count: int) -> list[int]:
    moved: list[int] = []
    while len(moved) < count:
        left = [j for j in range(score_NF.shape[1]) if j not in moved]
        wishes = [sorted(left, key=lambda j, e=e: -score_NF[e, j])[:width] for e in range(len(score_NF))]
        votes = {j: sum(j in wish for wish in wishes) for j in left}
        top = [j for j in left if votes[j] == max(votes.values())]
        top.sort(key=lambda j: -score_NF[:, j].sum())
        moved += top[: count - len(moved)]
    return sorted(moved)


def sets(partition: Partition) -> list[set[int]]:
    return [set(row[row != PADDING].tolist()) for row in partition.experts]


# ---- importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["feature_change", "feature_grad"])
@pytest.mark.parametrize("kernel", ["l1_norm", "l2_norm", "plain"])
def test_importance_is_the_formula(importance, kernel):
    ffn, context = problem(6)
    found = splitter(importance=importance, kernel=kernel).importance(ffn, context.inputs.clusters_T, context)
    np.testing.assert_allclose(found, plain_importance(ffn, context, importance, kernel), rtol=1e-4, atol=1e-5)


def test_importance_does_not_depend_on_batches_or_unused_clusters():
    found = []
    for batch in (1, 7, 4096):
        ffn, context = problem(6, batch=batch)
        labels = context.inputs.clusters_T.clamp(max=2)
        found.append(splitter().importance(ffn, labels, context))
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5)
    assert (found[0][3] == 0).all()
    assert (found[0][:3] > 0).all()


def test_half_precision_is_near():
    ffn, context = problem(6)
    half = replace(context, calibration=replace(context.inputs, compute_dtype=torch.bfloat16))
    labels = context.inputs.clusters_T
    want, found = (splitter().importance(ffn, labels, c) for c in (context, half))
    assert np.linalg.norm(found - want) < 0.02 * np.linalg.norm(want)


# ---- assignment -------------------------------------------------------------------------------------------------------


@st.composite
def scores(draw):
    experts, neurons = draw(st.integers(1, 6)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ties = draw(st.booleans())
    return rng.integers(-2, 3, (experts, neurons)).astype(float) if ties else rng.standard_normal((experts, neurons))


@settings(max_examples=100)
@given(scores(), st.integers(0, 5))
def test_greedy_takes_pair_after_pair(score, slack):
    capacity = -(-score.shape[1] // len(score)) + slack
    assert assign_greedily(score, capacity).tolist() == plain_greedy(score, capacity)


def test_greedy_needs_room():
    with pytest.raises(ValueError, match="5 neurons do not fit 2 x 2"):
        assign_greedily(np.ones((2, 5)), 2)


@settings(max_examples=60)
@given(scores(), st.integers(1, 8), st.data())
def test_most_wanted_is_the_plain_rule(score, width, data):
    count = data.draw(st.integers(0, score.shape[1]))
    assert most_wanted(score, width, count).tolist() == plain_most_wanted(score, width, count)


def test_optimal_is_at_least_greedy_and_sometimes_more():
    gains = []
    for seed in range(5):
        ffn, context = problem(6, seed=seed)
        score = plain_importance(ffn, context, "feature_change", "l1_norm")
        totals = []
        for assignment in ("greedy", "optimal"):
            partition = splitter(assignment=assignment).split(ffn, NONE, context)
            totals.append(sum(score[e, list(members)].sum() for e, members in enumerate(sets(partition))))
        gains.append(totals[1] - totals[0])
    assert min(gains) >= -1e-6
    assert max(gains) > 1e-3


def test_none_is_greedy_on_the_importance():
    ffn, context = problem(6)
    shared = np.array([2, 11])
    rest = np.setdiff1d(np.arange(24), shared)
    labels = np.array(plain_greedy(plain_importance(ffn, context, "feature_change", "l1_norm")[:, rest], 6))
    assert sets(splitter().split(ffn, shared, context)) == [set(rest[labels == e].tolist()) for e in range(4)]


def test_inner_is_each_clusters_best():
    ffn, context = problem(6)
    shared = np.array([2, 11])
    score = plain_importance(ffn, context, "feature_change", "l1_norm")
    partition = splitter(overlap="inner").split(ffn, shared, context)
    rest = [j for j in range(24) if j not in shared]
    expected = [set(sorted(rest, key=lambda j, e=e: -score[e, j])[:6]) for e in range(4)]
    assert sets(partition) == expected
    assert set(partition.omitted.tolist()) == set(rest) - set().union(*expected)
    assert len(partition.omitted) > 0


def test_inter_shares_what_most_clusters_want():
    ffn, context = problem(6)
    score = plain_importance(ffn, context, "feature_change", "l1_norm")
    partition = splitter(overlap="inter").split(ffn, np.arange(8), context)
    expected = plain_most_wanted(score, 4, 8)
    assert partition.shared.tolist() == expected
    rest = np.setdiff1d(np.arange(24), expected)
    labels = np.array(plain_greedy(score[:, rest], 6))
    assert sets(partition) == [set(rest[labels == e].tolist()) for e in range(4)]


@settings(max_examples=40)
@given(
    size=st.integers(4, 40),
    experts=st.integers(1, 6),
    share=st.floats(0, 0.9),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
    overlap=st.sampled_from(OVERLAPS),
    assignment=st.sampled_from(["greedy", "optimal"]),
    clusters=st.sampled_from(["text", "hidden"]),
)
def test_partitions(size, experts, share, padding, seed, overlap, assignment, clusters):
    shared = np.sort(np.random.default_rng(seed).permutation(size)[: int(share * size)])
    width = -(-(size - len(shared)) // experts) + padding
    ffn, context = problem(width, size, experts, tokens=12, seed=seed, top_k=1)
    method = splitter(overlap=overlap, assignment=assignment, clusters=clusters)
    partition = method.split(ffn, shared, context)
    partition.check(size, overlap=method.overlap)
    assert partition.experts.shape == (experts, width)
    assert len(partition.shared) == len(shared)
    assert method.chooses_shared or np.array_equal(partition.shared, shared)
    assert method.overlap or len(partition.omitted) == 0
    for row in partition.experts:
        members = row[row != PADDING]
        assert (np.diff(members) > 0).all()
        assert (row[len(members) :] == PADDING).all()
        assert not method.overlap or len(members) == min(width, size - len(shared))
    assert (partition.router_NH is None) == (clusters == "text")
    again = method.split(ffn, shared, context)
    assert np.array_equal(partition.slots, again.slots)


def test_does_not_depend_on_batches():
    for overlap, clusters in itertools.product(OVERLAPS, ("text", "hidden")):
        method = splitter(overlap=overlap, clusters=clusters)
        found = [method.split(*split_args) for split_args in _per_batch_size()]
        assert all(np.array_equal(found[0].slots, other.slots) for other in found)


def _per_batch_size():
    for batch in (3, 17, 4096):
        ffn, context = problem(6, batch=batch)
        yield ffn, np.array([1, 5]), context


# ---- clusters of inputs -----------------------------------------------------------------------------------------------


def test_planted_inputs_give_planted_experts():
    """Tokens of kind c point at axis c, and only neurons c, c + 4, ... matter there."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (200,), generator=generator)
    x = 5 * torch.nn.functional.one_hot(kind, 8).float() + 0.3 * torch.randn(200, 8, generator=generator)
    neuron_kind = torch.arange(24) % 4
    gate = torch.nn.functional.one_hot(neuron_kind, 8).float()
    ffn = FfnWeights(gate, gate, torch.randn(8, 24, generator=generator), torch.ones(8))
    inputs = replace(layer_inputs(x), gradients_TH=torch.randn(200, 8, generator=generator))
    context = layer_context(inputs, 6)
    for overlap in OVERLAPS:
        partition = splitter(clusters="hidden", overlap=overlap).split(ffn, NONE, context)
        experts = sorted(tuple(sorted(members)) for members in sets(partition))
        assert experts == [tuple(range(c, 24, 4)) for c in range(4)]
        chosen = (x @ partition.router_NH.T).argmax(1)
        for e, members in enumerate(sets(partition)):
            assert {int(neuron_kind[j]) for j in members} == set(kind[chosen == e].tolist())


def test_centroids_are_those_of_a_limited_sample(monkeypatch):
    context = problem(6, tokens=100)[1]
    rows, labels = input_clusters(context)
    assert torch.equal(labels, (context.inputs.x_TH @ rows.T).argmax(1))
    monkeypatch.setattr("llamamoe.methods.splitters.gradient.SAMPLE", 20)
    few, few_labels = input_clusters(context)
    assert few.shape == (4, 8)
    assert few_labels.shape == (100,)
    assert not torch.allclose(few, rows)


# ---- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (6, 6), (6, 4), (1, 1)])
def test_expected_copies_by_enumeration(experts, top_k):
    found = expected_copies(experts, top_k)
    for copies in range(1, experts + 1):
        active = [sum(e < copies for e in chosen) for chosen in itertools.combinations(range(experts), top_k)]
        seen = [a for a in active if a]
        assert found[copies] == pytest.approx(sum(seen) / len(seen))


def test_copies_are_scaled_in_their_down_columns_only():
    ffn, context = problem(6)
    method = splitter(overlap="inner")
    partition = method.split(ffn, np.array([2, 11]), context)
    found, parent = method.weights(ffn, partition, context), ExpertWeights.of_parent(ffn, partition)
    assert torch.equal(found.gate_PH, parent.gate_PH)
    assert torch.equal(found.up_PH, parent.up_PH)
    copies = [sum(int(j) in members for members in sets(partition)) for j in partition.slots]
    assert {1, 2} <= set(copies[2:])
    table = expected_copies(4, 2)
    factors = torch.tensor([1.0, 1.0] + [1 / table[n] for n in copies[2:]]).float()
    torch.testing.assert_close(found.down_HP, parent.down_HP * factors)
    plain = splitter(overlap="inner", duplicates="plain")
    assert plain.weights(ffn, partition, context) is None
    assert (method.kept, plain.kept) == ("gate_up", "neurons")


def test_with_all_experts_every_neuron_that_was_kept_counts_once():
    ffn, context = problem(6, top_k=4)
    method = splitter(overlap="inner")
    partition = method.split(ffn, np.array([2, 11]), context)
    assert len(partition.omitted) > 0
    weights = method.weights(ffn, partition, context)
    moe = ConvertedFfn(weights, partition, torch.zeros(4, 8), 4, "hard", "renormalised", 4.0)
    assert moe.coefficient == 1.0
    h_TF = plain_hidden(ffn, context.inputs.x_TH)
    h_TF[:, partition.omitted] = 0
    found = torch.cat(list(moe.outputs(context.inputs))).numpy()
    np.testing.assert_allclose(found, h_TF @ ffn.down_HF.double().numpy().T, rtol=1e-4, atol=1e-4)


# ---- contract ---------------------------------------------------------------------------------------------------------


def test_options_decide_what_is_promised():
    assert "gradient" in SPLITTERS
    none, inner, inter = (splitter(overlap=overlap) for overlap in OVERLAPS)
    assert [s.exact for s in (none, inner, inter)] == [True, False, True]
    assert [s.overlap for s in (none, inner, inter)] == [False, True, False]
    assert [s.chooses_shared for s in (none, inner, inter)] == [False, False, True]
    assert (Gradient.overlap, Gradient.chooses_shared) == (False, False)
    assert none.needs_clusters
    assert not splitter(clusters="hidden").needs_clusters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters_T": None}, "text cluster"),
        ({"clusters_T": torch.full((40,), 4)}, r"0\.\.3"),
        ({"gradients_TH": None}, "gradients"),
    ],
)
def test_refuses_missing_inputs(change, message):
    ffn, context = problem(6)
    with pytest.raises(ValueError, match=message):
        splitter().split(ffn, NONE, replace(context, calibration=replace(context.inputs, **change)))
    with pytest.raises(ValueError, match="calibration"):
        splitter().split(ffn, NONE, replace(context, calibration=None))


def test_nan_names_the_layer():
    ffn, context = problem(6)
    gradients = context.inputs.gradients_TH.clone()
    gradients[3, 3] = torch.nan
    with pytest.raises(LlamaMoeError, match="layer 5"):
        splitter().split(
            ffn, NONE, replace(context, layer=5, calibration=replace(context.inputs, gradients_TH=gradients))
        )


@pytest.mark.parametrize(("overlap", "asked"), [("none", True), ("inter", False)])
def test_the_selector_is_asked_only_if_it_chooses(overlap, asked):
    given = {"method": {"name": "gradient", "overlap": overlap}, "shared": 0.25, "calibration": ["auto"]}
    needing = complete(llamamoe.load_recipe(given=given | {"shared_by": "power"})).needing
    assert any("--shared-by" in text for text in needing) == asked


@pytest.mark.parametrize(("sequences", "warnings"), [(6, 0), (3, 1)])
def test_too_few_sequences_for_the_experts_warn(sequences, warnings):
    ids = np.random.default_rng(0).integers(0, 50, (sequences, 20))
    text = CalibrationText(ids, ("a",) * sequences, None, {}, ())
    sizes = {"model": SimpleNamespace(spec=SimpleNamespace(vocab_size=50)), "recipe": SimpleNamespace(seed=0)}
    plan = SimpleNamespace(splitter=splitter(), layout=SimpleNamespace(num_experts=4), **sizes)
    found = with_clusters(plan, text)
    assert set(found.clusters_S.tolist()) == set(range(min(4, sequences)))
    assert len(found.warnings) == warnings
    hidden = SimpleNamespace(splitter=splitter(clusters="hidden"), layout=plan.layout, **sizes)
    assert with_clusters(hidden, text) is text
