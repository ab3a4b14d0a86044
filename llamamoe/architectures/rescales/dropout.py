"""N/k: right on average for experts selected at random."""

from .base import Rescale


class Dropout(Rescale):
    """``c = N/k``: the sum over k experts drawn at random has the mean of the sum over all N, as in dropout."""

    name = "dropout"
    summary = "c = N/k, the right mean when experts are selected at random"
    reference = "Dropout (Srivastava et al. 2014), scaling at training time"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return num_experts / top_k
