"""MoEfication's graph split: the graph against its formula, planted groups, properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import PADDING, FfnWeights
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.methods.splitters.coactivation import Coactivation, coactive_sums, graph_weights

from .calibrated import layer_context, layer_inputs, plain_hidden, random_ffn, random_inputs

NONE = np.empty(0, np.int64)


@pytest.mark.parametrize("kernel", ["plain", "l1_norm", "l2_norm"])
@pytest.mark.parametrize("clamp", [None, 1.5])
def test_graph_is_the_formula(kernel: str, clamp: float | None) -> None:
    ffn, inputs, neurons = random_ffn(), random_inputs(tokens=13, batch_tokens=3), np.array([1, 4, 5, 20])
    h = plain_hidden(ffn, inputs.x_TH)[:, neurons]
    f = {"plain": h, "l1_norm": np.abs(h), "l2_norm": h**2}[kernel]
    plain = np.zeros((4, 4))
    for start in (0, 5, 10):
        for i in range(4):
            for j in range(4):
                run = sum(f[t, i] * f[t, j] for t in range(start, min(start + 5, 13)))
                plain[i, j] += run if clamp is None else min(run, clamp)
    sums = coactive_sums(ffn, neurons, inputs, kernel, clamp, 5)
    np.testing.assert_allclose(sums.numpy(), plain, rtol=1e-4, atol=1e-4)


def test_weights_are_thresholded_and_normalised() -> None:
    sums = np.array([[4, 1, 6, -2], [1, 1, 0.5, 0], [6, 0.5, 9, 3], [-2, 0, 3, 0]], np.float32)
    cosine = graph_weights(sums.copy(), cosine=True, percentile=0)
    np.testing.assert_allclose(cosine, [[0, 0.5, 1, 0], [0.5, 0, 1 / 6, 0], [1, 1 / 6, 0, 0], [0] * 4], atol=1e-6)
    plain = graph_weights(sums.copy(), cosine=False, percentile=80)
    np.testing.assert_allclose(plain, [[0, 0, 6, 0], [0, 0, 0, 0], [6, 0, 0, 3], [0, 0, 3, 0]])


def planted(size: int = 32, groups: int = 4) -> tuple[FfnWeights, torch.Tensor, np.ndarray]:
    """Every token wakes one group; neurons differ in size by a factor of a hundred, whatever their group."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randperm(size, generator=generator) % groups
    lengths = 10 ** (2 * torch.rand(size, 1, generator=generator) - 1)
    gate = 4 * torch.eye(groups, 8)[truth]
    up = lengths * (torch.eye(groups, 8)[truth] + 0.1 * torch.randn(size, 8, generator=generator))
    x = torch.eye(groups, 8)[torch.arange(120) % groups] + 0.1 * torch.randn(120, 8, generator=generator)
    return FfnWeights(gate, up, torch.randn(8, size, generator=generator), torch.ones(8)), x, truth.numpy()


@pytest.mark.parametrize("partitioner", ["spectral", "metis"])
@pytest.mark.parametrize("kernel", ["l1_norm", "l2_norm"])
def test_planted_groups_are_found(partitioner: str, kernel: str) -> None:
    ffn, x, truth = planted()
    splitter = Coactivation(Coactivation.Options(partitioner=partitioner, kernel=kernel))
    partition = splitter.split(ffn, NONE, layer_context(layer_inputs(x), 8))
    partition.check(32)
    assert all(len(set(truth[expert])) == 1 for expert in partition.experts)


@settings(max_examples=25)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(0, 9),
    st.sampled_from(["plain", "l1_norm", "l2_norm"]),
    st.sampled_from(["spectral", "metis"]),
)
def test_each_neuron_once(size: int, experts: int, spare: int, shared: int, kernel: str, partitioner: str) -> None:
    shared = min(shared, size)
    width = -(-(size - shared) // experts) + spare
    chosen = np.sort(np.random.default_rng(size).choice(size, shared, replace=False)).astype(np.int64)
    splitter = Coactivation(Coactivation.Options(kernel=kernel, partitioner=partitioner, starts=1))
    context = layer_context(random_inputs(tokens=9), width, experts, 1)
    partition = splitter.split(random_ffn(size=size), chosen, context)
    partition.check(size)
    assert np.array_equal(partition.shared, chosen)
    assert partition.experts.shape == (experts, width)
    sizes = (partition.experts != PADDING).sum(1)
    assert sizes.max() - sizes.min() <= 1


def test_batch_size_changes_nothing() -> None:
    splitter = Coactivation(Coactivation.Options(clamp=1.0, sample_tokens=16))
    first, *others = (
        splitter.split(random_ffn(), NONE, layer_context(random_inputs(batch_tokens=batch), 6))
        for batch in (4096, 7, 1)
    )
    assert all(np.array_equal(first.experts, other.experts) for other in others)


def test_repeatable_with_low_precision_and_dead_neurons() -> None:
    ffn = random_ffn(dtype=torch.bfloat16)
    ffn.up_FH[:7] = 0
    context = layer_context(random_inputs(), 6)
    first, again = (Coactivation().split(ffn, NONE, context) for _ in range(2))
    first.check(24)
    assert np.array_equal(first.experts, again.experts)


def test_nan_names_the_layer() -> None:
    inputs = random_inputs()
    inputs.x_TH[3, 2] = torch.nan
    with pytest.raises(LlamaMoeError, match="layer 17"):
        Coactivation().split(random_ffn(), NONE, layer_context(inputs, 6, layer=17))


def test_registered_with_its_defaults() -> None:
    assert SPLITTERS.get("coactivation") is Coactivation
    assert (Coactivation.parity, Coactivation.needs, Coactivation.default_rescale) == ("exact", "activations", "unit")
    assert Coactivation.working_bytes(1536, 576) >= 3 * 4 * 1536**2
