"""Balance of importance and load: the two losses of the first sparsely-gated mixture of experts."""

from __future__ import annotations

from typing import ClassVar

from ...lazy import torch
from ..gates.base import Gate
from ..routing import Routing, at_least_float32
from .base import LossContext, RoutingLoss, WindowOptions


class CvSquared(RoutingLoss):
    """``CV^2(importance) + CV^2(load)`` per layer, then the mean over layers; CV is standard deviation over mean.

    Importance of an expert is the sum of its weights over the tokens. Load is Shazeer's smooth count: for each token
    the probability that the expert would be selected again if its own noise were redrawn and that of the others stayed,
    ``Phi((clean_e - threshold_e) / std_e)``, where the threshold is the k-th largest *noisy logit* of the other
    experts. (LLaMA-MoE compares the noise alone with it, and so uses the wrong threshold for most experts.)

    Without noise (any gate but ``noisy_top_k``) there is no such probability, and a count has no gradient: then the
    loss is ``CV^2(importance)`` alone. With k = N everything is always selected, and the load is constant. Not linear
    in the batch: see `Window`.
    """

    name = "cv_squared"
    summary = "squared coefficient of variation of importance and of (smooth) load, per layer"
    reference = "arXiv:1701.06538"
    linear: ClassVar[bool] = False

    class Options(WindowOptions):
        """Options of `CvSquared`."""

    options: Options

    def layer_loss(self, routing: Routing, context: LossContext) -> torch.Tensor:
        """See `RoutingLoss.layer_loss`. O(T N)."""
        weights_Tk = at_least_float32(routing.weights_Tk)
        zeros_N = weights_Tk.new_zeros(routing.moe.num_experts)
        sums = [zeros_N.scatter_add(0, routing.indices_Tk.reshape(-1), weights_Tk.reshape(-1))]
        if routing.selection_TN is not None and routing.noise_std_TN is not None:
            sums.append(smooth_load_TN(routing).sum(0).to(weights_Tk.dtype))
        return squared_variation(context.reduce(torch.stack(sums), self.options.window)).sum()

    def kept_TN(self, *, noisy: bool) -> int:
        """See `RoutingLoss.kept_TN`: all are those of the smooth load."""
        return 5 if noisy else 0

    def notes(self, gate: Gate) -> list[str]:
        """See `RoutingLoss.notes`."""
        if gate.noisy:
            return []
        return [f"cv_squared: the gate {gate.name!r} adds no noise, so importance alone is balanced, not load"]


def smooth_load_TN(routing: Routing) -> torch.Tensor:
    """Return the probability of selecting an expert over its own noise, given the others' noise; ``[T, N]``."""
    assert routing.selection_TN is not None
    assert routing.noise_std_TN is not None
    noisy_TN = at_least_float32(routing.selection_TN)
    k = routing.indices_Tk.shape[-1]
    if k == routing.moe.num_experts:
        return torch.ones_like(noisy_TN)
    top_TK, order_TK = noisy_TN.topk(k + 1, dim=-1)
    selected_TN = torch.zeros_like(noisy_TN, dtype=torch.bool).scatter_(-1, order_TK[:, :k], True)
    # The k-th largest of the others is the (k+1)-th of all for an expert that is itself among the k largest.
    threshold_TN = torch.where(selected_TN, top_TK[:, k : k + 1], top_TK[:, k - 1 : k])
    clean_TN = at_least_float32(routing.logits_TN)
    load_TN: torch.Tensor = torch.special.ndtr((clean_TN - threshold_TN) / routing.noise_std_TN)
    return load_TN


def squared_variation(sums_XN: torch.Tensor) -> torch.Tensor:
    """Return the population variance over squared mean of each row."""
    means_X = sums_XN.mean(-1)
    return sums_XN.var(-1, correction=0) / means_X.square()
