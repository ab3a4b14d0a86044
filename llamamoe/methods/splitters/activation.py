"""Group neurons that are among the most active on the same tokens."""

from __future__ import annotations

from pydantic import Field

from ...lazy import np, scipy
from ..layer import BATCH_TOKENS, FfnWeights, LayerContext, Partition
from ..markers import Distance, MarkerOptions, activation_markers, activation_rates, mean_patterns, pattern_distances
from .base import Splitter, routed_neurons


class Activation(Splitter):
    """CMoE: balanced clusters of the neurons' activation markers, around the most active neurons.

    ``A_tj`` is 1 if ``|h_tj|`` is among the ``k_act`` largest of token t, ``mu_j = mean_t A_tj`` (with
    ``h = act(x^ g^) * (x^ u^)``, inputs and rows of length 1). Without the shared neurons (CMoE: those with
    the highest rate, the selector ``rate``), the first centroids are the columns ``A_:j`` of the N neurons with the
    highest rate. Every neuron then goes to a centroid so that the sum of ``||A_:j - c_i||`` is least with at most W
    neurons per expert, solved exactly. CMoE stops here (``iterations`` 1); further iterations take the mean column of
    each expert as its centroid and assign again, until nothing changes, and the assignment of the least total distance
    to its own centroids is kept.

    CMoE's code uses the L1 distance and its paper L2: both are available. If fewer than N neurons are left, some
    centroids are the same.
    """

    name = "activation"
    summary = "CMoE: balanced clusters of the neurons' activation markers; one assignment, or iterated"
    reference = "CMoE (arXiv:2502.04416)"
    needs = "activations"
    default_rescale = "unit"
    default_router = "analytic"
    default_shared = 0.25
    default_shared_by = "rate"

    class Options(MarkerOptions):
        """Options of `Activation`."""

        distance: Distance = Field(
            "l1", description="Distance between marker columns: l1 as in CMoE's code, l2 as in its paper."
        )
        iterations: int = Field(1, ge=1, description="Maximum number of assignments; 1 is CMoE's single pass.")

    options: Options

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`. O(T F H) for the markers, O(T k_act N) per iteration; 8 T N bytes for centroids."""
        neurons = routed_neurons(ffn.intermediate_size, shared)
        markers = activation_markers(ffn, context, self.options)[:, neurons]
        labels = cluster_markers(
            markers, context.num_experts, context.expert_width, self.options.distance, self.options.iterations
        )
        return Partition.from_labels(neurons, labels, context, shared)

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """See `Splitter.working_bytes`: two normalised matrices and a batch of activations, in float32."""
        return 4 * intermediate_size * (2 * hidden_size + 3 * BATCH_TOKENS)


def cluster_markers(
    markers_QF: scipy.sparse.csr_array, num_clusters: int, capacity: int, distance: Distance, iterations: int
) -> np.ndarray:
    """Return int64 ``[F]``: the cluster of each column, at most ``capacity`` in one; see `Activation` for the rule."""
    from ..solvers.balance import assign_balanced

    if markers_QF.shape[1] == 0:
        return np.empty(0, np.int64)
    first = np.argsort(-activation_rates(markers_QF), kind="stable")[:num_clusters]
    centroids = markers_QF[:, np.resize(first, num_clusters)].toarray()
    cost = pattern_distances(markers_QF, centroids, distance)
    best, least, seen = np.empty(0, np.int64), np.inf, np.empty(0, np.int64)
    for step in range(iterations):
        labels = assign_balanced(cost, capacity)
        if step + 1 == iterations == 1:
            return labels
        if np.array_equal(labels, seen):
            break
        members = [np.flatnonzero(labels == cluster) for cluster in range(num_clusters)]
        cost = pattern_distances(markers_QF, mean_patterns(markers_QF, members), distance)
        total = float(cost[np.arange(len(labels)), labels].sum())
        if total < least:
            best, least = labels, total
        seen = labels
    return best
