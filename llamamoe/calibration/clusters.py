"""Cluster calibration text without labels, for splitters that assign a cluster to each expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UsageError
from ..lazy import scipy

DIMENSIONS = 64
"""Maximum number of dimensions after reduction of the token counts."""
_STARTS = 4


def text_clusters(ids_ST: np.ndarray, vocab_size: int, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster sequences by their token counts.

    Each sequence is a vector of its token counts, ``(1 + ln tf) ln(S / df)`` (tf: how often the token is in the
    sequence, df: in how many of the S sequences; a token of every sequence carries no information), scaled to length 1,
    reduced to `DIMENSIONS` by a truncated singular value decomposition (latent semantic analysis), scaled to length
    1 again, and clustered by k-means without limits of size; the best of four starts.

    This differs from the papers, so that no second model is needed: LLaMA-MoE (arXiv:2406.16554) clusters
    sentence embeddings of documents (all-mpnet-base-v2, k-means), LLaMA-MoE v2 (arXiv:2411.15708) the inputs of each
    FFN, token by token and layer by layer. Here a sequence is in one cluster, the same in all layers, and "kind"
    means vocabulary: it distinguishes code from prose or languages from each other, not a sad story from a happy one.

    Args:
        ids_ST: int64 ``[S, T]``.
        vocab_size: Larger than all ids.
        num_clusters: K, at most S.
        seed: Seed of the decomposition and the starts.

    Returns:
        int64 ``[S]`` in 0 .. K-1, numbered in the order in which the clusters first appear, none empty. Sizes
        may differ widely. Repeatable for the same seed, versions and number of BLAS threads.

    Raises:
        UsageError: There are fewer sequences than clusters, or no cluster.
    """
    from ..methods.solvers.clustering import balanced_kmeans

    count = len(ids_ST)
    if not 1 <= num_clusters <= count:
        raise UsageError(
            f"{num_clusters} text clusters cannot be formed from {count} sequences of calibration text.",
            hint="Use more calibration tokens, shorter sequences, or fewer clusters (at least 1).",
        )
    points_SD = _reduced(_weighted_counts(ids_ST, vocab_size), seed)
    labels = balanced_kmeans(points_SD, num_clusters, count, seed=seed, n_init=_STARTS, tol=0.0).labels
    labels = _filled(points_SD, labels, num_clusters)
    first = np.unique(labels, return_index=True)[1]
    return np.asarray(np.argsort(np.argsort(first))[labels], dtype=np.int64)


def _weighted_counts(ids_ST: np.ndarray, vocab_size: int) -> Any:
    """Return weighted counts, scipy csr float64 ``[S, V]``, in rows of length 1 (0 if no token distinguishes it)."""
    count = len(ids_ST)
    keys, frequency = np.unique(ids_ST + np.arange(count)[:, None] * vocab_size, return_counts=True)
    rows, tokens = np.divmod(keys, vocab_size)
    documents = np.bincount(tokens, minlength=vocab_size)
    values = (1 + np.log(frequency)) * np.log(count / documents[tokens])
    norms = np.sqrt(np.bincount(rows, values**2, minlength=count))
    values = values / np.where(norms > 0, norms, 1.0)[rows]
    return scipy.sparse.csr_array((values, (rows, tokens)), shape=(count, vocab_size))


def _reduced(counts_SV: Any, seed: int) -> np.ndarray:
    """Return the leading left singular vectors times their values, with rows of length 1; float32 ``[S, D]``."""
    from sklearn.utils.extmath import randomized_svd

    dimensions = min(DIMENSIONS, *counts_SV.shape)
    state = int(np.random.default_rng([seed, *b"text clusters"]).integers(2**32))
    left_SD, singular_D, _ = randomized_svd(counts_SV, dimensions, n_iter=7, random_state=state)
    points_SD = left_SD * singular_D
    norms = np.linalg.norm(points_SD, axis=1, keepdims=True)
    return np.asarray(points_SD / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def _filled(points_SD: np.ndarray, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return labels in which each empty cluster receives the sequence farthest from the mean of the largest one."""
    labels = labels.copy()
    for empty in np.flatnonzero(np.bincount(labels, minlength=num_clusters) == 0):
        members = np.flatnonzero(labels == np.bincount(labels).argmax())
        distances = np.linalg.norm(points_SD[members] - points_SD[members].mean(0), axis=1)
        labels[members[distances.argmax()]] = empty
    return labels
