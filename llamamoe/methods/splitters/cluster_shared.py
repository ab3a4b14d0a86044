"""Combine shared neurons and clusters, from the weights alone."""

from __future__ import annotations

from .kmeans import KMeans


class ClusterShared(KMeans):
    """A quarter of the neurons is shared (chosen by the recipe's selector), the rest is partitioned as by `KMeans`.

    Shared neurons are used by every token, whatever the router does; a conversion without calibration text
    loses least this way. Original to this project.
    """

    name = "cluster_shared"
    summary = "shared neurons by the selector, the rest by kmeans: for conversion without calibration text"
    reference = ""
    default_rescale = "unit"  # the demo's conversions lose several orders of magnitude less with it than with dropout
    default_shared = 0.25
