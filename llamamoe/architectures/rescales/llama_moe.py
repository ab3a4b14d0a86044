"""What the released LLaMA-MoE models run."""

from .base import Rescale


class LlamaMoe(Rescale):
    """``y = (N/k) sum_i w_i E_i`` with weights that sum to 1, so ``c = N/k^2``. For reproduction; never exact."""

    name = "llama_moe"
    summary = "c = N/k^2, as LLaMA-MoE runs it (score_scale_factor = N/k); for reproduction"
    reference = "LLaMA-MoE (arXiv:2406.16554)"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return num_experts / top_k**2
