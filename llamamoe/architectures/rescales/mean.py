"""1/k: copies of one FFN are averaged."""

from .base import Rescale


class Mean(Rescale):
    """``c = 1/k`` for k copies of the whole FFN; ``c = G/k`` for copies of its G parts, of which k/G full sets count.

    In general N/k with N the experts that hold the FFN once: the number of `Dropout`, but for another reason, and for
    copies exact at every k (that is a multiple of G).
    """

    name = "mean"
    summary = "c = 1/k for copies of the FFN (G/k for copies of G parts): selected copies are averaged"
    reference = "Sparse upcycling (arXiv:2212.05055), combine weights that sum to 1"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return num_experts / top_k
