"""1: a hard weight for experts that are selected because they matter."""

from .base import Rescale


class Unit(Rescale):
    """``c = 1``: a selected expert gives just what it gave in the dense FFN."""

    name = "unit"
    summary = "c = 1, selected experts count as in the dense FFN"
    reference = "CMoE (arXiv:2502.04416), training-free weights"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return 1.0
