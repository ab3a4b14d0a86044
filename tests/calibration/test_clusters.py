from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.calibration.clusters import _weighted_counts, text_clusters
from llamamoe.errors import UsageError


def planted(sequences: int, kinds: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that share half of their words with all others and have the rest of a vocabulary of their kind."""
    kind = np.arange(sequences) % kinds
    common = rng.integers(0, 20, (sequences, 32))
    own = 20 + kind[:, None] * 20 + rng.integers(0, 20, (sequences, 32))
    return np.concatenate([common, own], 1), kind


def test_planted_kinds_are_found_and_numbered_in_order():
    ids, kind = planted(40, 4, np.random.default_rng(0))
    labels = text_clusters(ids, 100, 4, seed=1)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, kind)  # kinds first appear as 0, 1, 2, 3


def test_kinds_of_unequal_size_stay_unequal():
    rng = np.random.default_rng(3)
    ids = np.concatenate([rng.integers(0, 20, (30, 64)), rng.integers(20, 40, (3, 64))])
    assert np.bincount(text_clusters(ids, 40, 2, seed=0)).tolist() == [30, 3]


def test_weights_are_those_of_the_formula():
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 12, (5, 9))
    ids[:, 0] = 11  # in every sequence: says nothing
    want = np.zeros((5, 12))
    for s in range(5):
        for v in range(12):
            tf = sum(1 for token in ids[s] if token == v)
            df = sum(1 for row in ids if v in row)
            want[s, v] = (1 + np.log(tf)) * np.log(5 / df) if tf else 0.0
        want[s] /= np.linalg.norm(want[s])
    np.testing.assert_allclose(_weighted_counts(ids, 12).toarray(), want, atol=1e-12)
    assert not want[:, 11].any()


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_every_cluster_has_a_sequence(sequences, length, clusters, seed):
    ids = np.random.default_rng(seed).integers(0, 3, (sequences, length))  # many are alike
    if clusters > sequences:
        with pytest.raises(UsageError, match=f"{clusters} text clusters cannot be formed from {sequences} sequences"):
            text_clusters(ids, 3, clusters, seed)
        return
    labels = text_clusters(ids, 3, clusters, seed)
    assert labels.shape == (sequences,)
    assert set(labels.tolist()) == set(range(clusters))
    assert np.array_equal(labels, text_clusters(ids, 3, clusters, seed))


def test_no_cluster_is_refused():
    with pytest.raises(UsageError, match="0 text clusters"):
        text_clusters(np.zeros((3, 4), np.int64), 5, 0, seed=0)
