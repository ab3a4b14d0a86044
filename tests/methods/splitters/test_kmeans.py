"""The weight-only clustering splitters."""

import subprocess
import sys

import numpy as np
import torch

from llamamoe.methods.layer import FfnWeights, LayerContext
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.methods.splitters.cluster_shared import ClusterShared
from llamamoe.methods.splitters.kmeans import KMeans


def ffn_with_groups(size: int = 48, groups: int = 4, hidden: int = 16) -> tuple[FfnWeights, np.ndarray]:
    """An FFN whose gate rows point in ``groups`` directions, with lengths that would mislead unnormalised k-means."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(size) % groups
    lengths = 10 ** (2 * torch.rand(size, 1, generator=generator))
    gate = lengths * (torch.eye(groups, hidden)[truth] + 0.05 * torch.randn(size, hidden, generator=generator))
    up = torch.randn(size, hidden, generator=generator)
    down = torch.randn(hidden, size, generator=generator)
    return FfnWeights(gate, up, down, torch.ones(hidden)), truth.numpy()


def context(width: int, num_experts: int = 4, layer: int = 0) -> LayerContext:
    return LayerContext(layer=layer, num_experts=num_experts, top_k=2, expert_width=width, seed=0)


NONE = np.empty(0, np.int64)


def test_directions_are_found_whatever_the_lengths():
    ffn, truth = ffn_with_groups()
    partition = KMeans(KMeans.Options(n_init=4)).split(ffn, NONE, context(12))
    partition.check(48)
    assert all(len(set(truth[expert])) == 1 for expert in partition.experts)


def test_the_other_matrix_can_be_used():
    ffn, truth = ffn_with_groups()
    swapped = FfnWeights(ffn.up_FH, ffn.gate_FH, ffn.down_HF, ffn.norm_H)
    partition = KMeans(KMeans.Options(weight="up", n_init=4)).split(swapped, NONE, context(12))
    assert all(len(set(truth[expert])) == 1 for expert in partition.experts)


def test_repeatable_and_per_layer():
    ffn, _ = ffn_with_groups(groups=16)
    first, again, other = (KMeans().split(ffn, NONE, context(12, layer=layer)) for layer in (0, 0, 1))
    assert np.array_equal(first.experts, again.experts)
    assert not np.array_equal(first.experts, other.experts)


def test_low_precision_zero_rows_and_equal_rows():
    """A pruned model has zero rows; they have no direction and must not end in NaN."""
    gate = torch.zeros(32, 8, dtype=torch.bfloat16)
    gate[:8, 0] = 1
    ffn = FfnWeights(gate, gate, gate.T, torch.ones(8))
    KMeans().split(ffn, NONE, context(8)).check(32)


def test_registered_with_their_defaults():
    assert SPLITTERS.get("kmeans") is KMeans
    assert SPLITTERS.get("cluster_shared") is ClusterShared
    assert (KMeans.default_shared, ClusterShared.default_shared) == (0.0, 0.25)
    assert (KMeans.default_rescale, ClusterShared.default_rescale) == ("dropout", "unit")
    for splitter in (KMeans, ClusterShared):
        assert splitter.default_router == "centroid"
        assert splitter.needs == "weights"


def test_discovery_imports_nothing_heavy():
    code = (
        "import sys; from llamamoe.methods.splitters import SPLITTERS; SPLITTERS.names(); "
        "heavy = {'torch', 'sklearn', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
