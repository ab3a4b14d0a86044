"""Let experts compete for tokens by the likelihood of a mixture of Gaussians."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...lazy import torch
from ..moe_layers import ExpertWeights
from ..routing import Routing, at_least_float32
from .base import LossContext, RoutingLoss

Scale = Literal["fitted", "alone"]

_CHUNK_NUMBERS = 2**23
"""Maximum number of activations or outputs of all experts in a chunk of tokens (32 MB of float32)."""


class Competitive(RoutingLoss):
    """``-log sum_i p_i exp(-d_i / (2 sigma^2))`` per token, ``d_i = ||r - o_i||^2``: sum over tokens, mean over layers.

    ``p`` are the router's probabilities, ``r`` the target of the routed experts' joint output (the parent's FFN minus
    the shared neurons), ``o_i`` the output of expert i alone. The gradient for softmax logits is p minus the posterior
    ``h_i ~ p_i exp(-d_i / (2 sigma^2))``: each token's router is drawn to the experts that explain its target better
    than others do. That warms up routers.

    With ``experts`` the experts learn too, as in the paper: the gradient for ``o_i`` is ``h_i (o_i - r) / sigma^2``, so
    that each expert approaches the targets of the tokens that it explains best. It learns to explain them alone, which
    suits copies of a whole FFN and k = 1; experts of a partition are parts of a sum. Inputs get no gradient through the
    experts: they are data, and the target depends on them.

    ``sigma^2`` is the token's own mean of ``d_i`` over experts, times ``temperature``, without gradient: it does not
    move with the weights, large tokens do not count more than small ones, and the loss is linear in the batch. The
    paper's is 1 (``variance``).

    The size of ``o_i`` (``scale``): ``alone`` treats the expert as the only selected one, with the weight that
    its router then gives it (1 if renormalised). That is correct for copies of a whole FFN, but the experts of a
    partition are N/k or N times their neurons' share: the weakest expert would win, because it deviates least.
    ``fitted`` multiplies all experts' outputs on a token by the single factor with the least error over all of them,
    ``sum_i r.o_i / sum_i ||o_i||^2`` (at least 0): 1/N for a partition, 1 for copies. Neither has a gradient.
    """

    name = "competitive"
    summary = "likelihood of the parent's output under a mixture of the experts, to warm routers up or train experts"
    reference = "Jacobs, Jordan, Nowlan, Hinton 1991, doi:10.1162/neco.1991.3.1.79"
    linear: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True

    class Options(RoutingLoss.Options):
        """Options of `Competitive`."""

        coefficient: float = Field(1.0, ge=0, allow_inf_nan=False, description="What the loss is multiplied by.")
        temperature: float = Field(
            1.0, gt=0, allow_inf_nan=False, description="Multiplies sigma^2: below 1 the best expert wins more clearly."
        )
        variance: float | None = Field(
            None,
            gt=0,
            allow_inf_nan=False,
            description="sigma^2: the paper's is 1; null: the mean over experts of a token's squared distances.",
        )
        scale: Scale = Field(
            "fitted", description="Size of an expert's output: the least squares', or as if it alone were selected."
        )
        experts: bool = Field(False, description="Train experts too, as the paper does, not only routers.")

    options: Options

    def layer_loss(self, routing: Routing, context: LossContext) -> torch.Tensor:
        """See `RoutingLoss.layer_loss`. O(T F H), as a forward pass through all experts."""
        if context.targets is None:
            raise ValueError("the competitive loss needs LossContext.targets")
        options, target_TH = self.options, context.targets(routing)
        distances_TN = expert_distances(routing, target_TH, options.scale, learn=options.experts)
        variance_T1 = distances_TN.detach().mean(-1, keepdim=True)
        if options.variance is not None:
            variance_T1 = torch.full_like(variance_T1, options.variance)
        twice_T1 = (2 * options.temperature * variance_T1).clamp(min=torch.finfo(variance_T1.dtype).tiny)
        return -torch.logsumexp(_log_probabilities(routing) - distances_TN / twice_T1, -1).sum()

    @property
    def trains_experts(self) -> bool:
        """See `RoutingLoss.trains_experts`."""
        return self.options.experts

    def kept_TN(self, *, noisy: bool) -> int:
        """See `RoutingLoss.kept_TN`: probabilities and posterior; for experts' gradients distances too."""
        return 3 if self.options.experts else 2

    def working_numbers(self, tokens: int, num_experts: int, hidden_size: int, width: int) -> int:
        """See `RoutingLoss.working_numbers`.

        Of a chunk gate, up, their product and outputs, or outputs and their product with targets. In the backward pass
        gate, up, silu, product, outputs, and three arrays of the size of the outputs for their gradient.
        """
        rows = min(tokens, _rows(num_experts, hidden_size, width))
        if self.options.experts:
            return rows * num_experts * (4 * width + 4 * hidden_size)
        return rows * num_experts * max(3 * width + hidden_size, 2 * hidden_size)


def _rows(num_experts: int, hidden_size: int, width: int) -> int:
    """Return the number of tokens of a chunk."""
    return max(1, _CHUNK_NUMBERS // (num_experts * max(2 * width, hidden_size)))


def _log_probabilities(routing: Routing) -> torch.Tensor:
    """Return the logarithm of `Routing.probabilities_TN`, safe where one of them is 0."""
    logits = at_least_float32(routing.logits_TN)
    if routing.moe.weighting.startswith("sigmoid"):
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(-1)


def expert_distances(
    routing: Routing, target_TH: torch.Tensor, scale: Scale = "fitted", *, learn: bool = False
) -> torch.Tensor:
    """Return the squared distance of every expert's own output from the target.

    O(T F H); memory holds the experts' outputs for one chunk of tokens, which are computed again in the backward pass,
    and T x N numbers.

    Args:
        routing: The routing with ``inputs_TH``; its layer's experts must be unsharded on this device.
        target_TH: r.
        scale: See `Competitive`.
        learn: Whether the distances have a gradient for the experts' weights.

    Returns:
        ``[T, N]`` of at least float32.
    """
    assert routing.inputs_TH is not None
    with torch.set_grad_enabled(learn), torch.autocast(target_TH.device.type, enabled=False):
        weights = routing.moe.expert_weights()
        rows = _rows(routing.moe.num_experts, weights.down_NHW.shape[1], weights.down_NHW.shape[2])
        sizes = [None] * -(-len(target_TH) // rows) if scale == "fitted" else torch.split(_alone(routing), rows)
        chunks = zip(torch.split(routing.inputs_TH.detach(), rows), torch.split(target_TH, rows), sizes, strict=True)
        if not learn:
            return torch.cat([_chunk_distances(weights, *chunk) for chunk in chunks])
        checkpoint = torch.utils.checkpoint.checkpoint
        found = [checkpoint(_chunk_distances, weights, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(found)


def _alone(routing: Routing) -> torch.Tensor:
    """Return the weight of each expert's bare output if it alone were selected, ``[T, N]``."""
    logits = at_least_float32(routing.logits_TN.detach())
    weights = {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid}.get(routing.moe.weighting)
    return torch.full_like(logits, routing.moe.factor) * (1.0 if weights is None else weights())


def _chunk_distances(
    weights: ExpertWeights, x_BH: torch.Tensor, target_BH: torch.Tensor, size: torch.Tensor | None
) -> torch.Tensor:
    """See `expert_distances`; ``size`` multiplies the experts' outputs, None: the least squares' factor. ``[B, N]``."""
    out_NBH = _outputs(weights, x_BH)
    target_BH = at_least_float32(target_BH).to(out_NBH.dtype)
    dots_BN, squares_BN = (out_NBH * target_BH).sum(-1).T, out_NBH.square().sum(-1).T
    if size is None:
        total_B1 = squares_BN.detach().sum(-1, keepdim=True)
        size = (dots_BN.detach().sum(-1, keepdim=True) / total_B1).clamp(min=0).where(total_B1 > 0, 0.0)
    length_B1 = target_BH.square().sum(-1, keepdim=True)
    return (length_B1 - 2 * size * dots_BN + size**2 * squares_BN).clamp(min=0)


def _outputs(weights: ExpertWeights, x_BH: torch.Tensor) -> torch.Tensor:
    """Return the output of each expert at weight 1, ``[N, B, H]``."""
    gate_up, down_NHW = weights.gate_up_N2WH, at_least_float32(weights.down_NHW)
    n, _, width = down_NHW.shape
    both = at_least_float32(x_BH.to(gate_up.dtype) @ gate_up.flatten(0, 1).T).view(-1, n, 2 * width)
    h_BNW = weights.activation(both[..., :width]) * both[..., width:]
    return h_BNW.transpose(0, 1) @ down_NHW.transpose(1, 2)
