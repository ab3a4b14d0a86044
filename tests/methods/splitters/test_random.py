"""Cards are dealt: each neuron once, sizes within one, another seed another hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.methods.layer import PADDING, FfnWeights, LayerContext, Partition
from llamamoe.methods.splitters.random import Random


def split(size: int, experts: int, shared: np.ndarray, seed: int = 0, layer: int = 0) -> Partition:
    weights = torch.zeros(size, 1)
    width = -(-(size - len(shared)) // experts)
    context = LayerContext(layer, experts, 1, width, seed)
    return Random().split(FfnWeights(weights, weights, weights.T, torch.ones(1)), shared, context)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 300), st.integers(0, 2**63 - 1))
def test_partition(size: int, experts: int, num_shared: int, seed: int) -> None:
    shared = np.sort(np.random.default_rng(seed).permutation(size)[: min(num_shared, size - 1)]).astype(np.int64)
    partition = split(size, experts, shared, seed)
    partition.check(size)
    counts = (partition.experts != PADDING).sum(1)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(partition.shared, shared)
    for row, count in zip(partition.experts, counts, strict=True):
        assert (np.diff(row[:count]) > 0).all()
        assert (row[count:] == PADDING).all()


def test_seed_and_layer_decide() -> None:
    none = np.empty(0, np.int64)
    base = split(64, 4, none).experts
    assert np.array_equal(base, split(64, 4, none).experts)
    assert not np.array_equal(base, split(64, 4, none, seed=1).experts)
    assert not np.array_equal(base, split(64, 4, none, layer=1).experts)


@pytest.mark.parametrize("experts", [[[0, 1], [1, 2]], [[0, 1], [2, PADDING]], [[0, 1], [2, 4]], [[0, 1], [2, -2]]])
def test_check_finds_what_is_wrong(experts: list[list[int]]) -> None:
    none = np.empty(0, np.int64)
    with pytest.raises(ValueError, match="neuron"):
        Partition(np.array(experts), none, none).check(4)
