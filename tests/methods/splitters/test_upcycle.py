"""Copies: every part in every set, what is renewed and what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.methods.layer import PADDING, ExpertWeights, LayerContext
from llamamoe.methods.splitters.upcycle import Upcycle
from tests.methods.splitters.calibrated import layer_context, random_ffn

HIDDEN = 8


def splitter(**options: float) -> Upcycle:
    return Upcycle(Upcycle.Options.model_validate(options))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10), st.integers(0, 3))
def test_every_set_of_parts_is_the_whole_ffn(size: int, groups: int, copies: int, shared: int, spare: int) -> None:
    shared, groups = min(shared, size - 1), min(groups, size)
    ffn, method = random_ffn(size, 4), splitter(groups=groups)
    kept = np.sort(np.random.default_rng(size).permutation(size)[:shared])
    experts = groups * copies
    width = -(-(size - shared) // method.parts(experts)) + spare
    partition = method.split(ffn, kept, layer_context(None, width, experts, groups))
    partition.check(size, overlap=True)
    assert np.array_equal(partition.shared, kept)
    for start in range(0, experts, groups):
        one_set = partition.experts[start : start + groups]
        neurons = one_set[one_set != PADDING]
        assert np.array_equal(neurons, np.setdiff1d(np.arange(size), kept)), "consecutive parts, in order"
        assert np.array_equal(one_set, partition.experts[:groups])


def test_rows_of_a_set_are_the_same() -> None:
    rows = torch.randn(6, 4)
    tied = splitter(groups=3).tie(rows)
    assert torch.equal(tied, rows[[0, 0, 0, 3, 3, 3]])
    assert torch.equal(splitter().tie(rows), rows)


def _renewed(reinit: float, context: LayerContext) -> tuple[ExpertWeights, ExpertWeights, np.ndarray]:
    ffn, method = random_ffn(200, HIDDEN), splitter(reinit=reinit)
    partition = method.split(ffn, np.arange(20), context)
    found = method.weights(ffn, partition, context)
    assert found is not None
    return ExpertWeights.of_parent(ffn, partition), found, partition.slots


@pytest.mark.parametrize("reinit", [0.25, 0.5, 1.0])
def test_a_share_of_neurons_is_new_in_all_three_matrices(reinit: float) -> None:
    """... of every expert; shared neurons, padding and the others are untouched."""
    old, new, slots = _renewed(reinit, layer_context(None, 184, 3))
    changed = [
        (a != b).all(1).numpy()
        for a, b in ((old.gate_PH, new.gate_PH), (old.up_PH, new.up_PH), (old.down_HP.T, new.down_HP.T))
    ]
    same = [
        (a == b).all(1).numpy()
        for a, b in ((old.gate_PH, new.gate_PH), (old.up_PH, new.up_PH), (old.down_HP.T, new.down_HP.T))
    ]
    assert all(np.array_equal(changed[0], c) for c in changed)
    assert all(np.array_equal(~changed[0], s) for s in same)
    assert not changed[0][:20].any()
    assert not changed[0][slots == PADDING].any()
    assert changed[0][20:].reshape(3, 184).sum(1).tolist() == [round(reinit * 180)] * 3


def test_new_values_have_mean_and_deviation_of_the_old() -> None:
    old, new, _ = _renewed(1.0, layer_context(None, 180, 3))
    for before, after in ((old.gate_PH, new.gate_PH), (old.up_PH, new.up_PH), (old.down_HP, new.down_HP)):
        a, b = (w.T if w.shape[0] == HIDDEN else w for w in (before, after))
        a, b = a[20:], b[20:]
        count = b.numel()
        assert abs(float(b.mean() - a.mean())) < 5 * float(a.std()) / count**0.5
        assert abs(float(b.std() / a.std()) - 1) < 5 / (2 * count) ** 0.5


def test_renewal_depends_on_seed_and_layer_only() -> None:
    first, again = (_renewed(0.5, layer_context(None, 180, 3, seed=4, layer=1))[1] for _ in range(2))
    other = _renewed(0.5, layer_context(None, 180, 3, seed=4, layer=2))[1]
    assert torch.equal(first.down_HP, again.down_HP)
    assert not torch.equal(first.down_HP, other.down_HP)


def test_what_is_exact_replaces_no_weights() -> None:
    ffn, method = random_ffn(), splitter()
    partition = method.split(ffn, np.arange(0), layer_context(None, 24, 2))
    assert method.weights(ffn, partition, layer_context(None, 24, 2)) is None
    assert (method.exact, method.kept) == (True, "neurons")
    assert (splitter(reinit=0.1).exact, splitter(reinit=0.1).kept) == (False, "nothing")
