"""Let experts compete for tokens by the likelihood of a mixture of Gaussians, to warm up a router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from ...lazy import torch
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
    than others do. Experts get no gradient; it is a warm-up of routers.

    ``sigma^2`` is the token's own mean of ``d_i`` over experts, times ``temperature``, without gradient: it does not
    move while the router learns, large tokens do not count more than small ones, and the loss is linear in the batch.

    The size of ``o_i`` (``scale``): ``alone`` treats the expert as the only selected one, with the weight that
    its router then gives it (1 if renormalised). That is correct for copies of a whole FFN, but the experts of a
    partition are N/k or N times their neurons' share: the weakest expert would win, because it deviates least.
    ``fitted`` multiplies all experts' outputs on a token by the single factor with the least error over all of them,
    ``sum_i r.o_i / sum_i ||o_i||^2`` (at least 0): 1/N for a partition, 1 for copies.
    """

    name = "competitive"
    summary = "likelihood of the parent's output under a mixture of the experts, to warm routers up"
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
        scale: Scale = Field(
            "fitted", description="Size of an expert's output: the least squares', or as if it alone were selected."
        )

    options: Options

    def layer_loss(self, routing: Routing, context: LossContext) -> torch.Tensor:
        """See `RoutingLoss.layer_loss`. O(T F H), as a forward pass through all experts."""
        if context.targets is None:
            raise ValueError("the competitive loss needs LossContext.targets")
        with torch.no_grad():
            distances_TN = expert_distances(routing, context.targets(routing), self.options.scale)
            variance_T1 = self.options.temperature * distances_TN.mean(-1, keepdim=True)
            explained_TN = -distances_TN / (2 * variance_T1.clamp(min=torch.finfo(variance_T1.dtype).tiny))
        return -torch.logsumexp(_log_probabilities(routing) + explained_TN, -1).sum()

    @classmethod
    def kept_TN(cls, *, noisy: bool) -> int:
        """See `RoutingLoss.kept_TN`: probabilities and posterior."""
        return 2

    @classmethod
    def working_numbers(cls, tokens: int, num_experts: int, hidden_size: int, width: int) -> int:
        """See `RoutingLoss.working_numbers`: of a chunk gate, up and their product, outputs, and outputs times targets."""
        rows = min(tokens, _rows(num_experts, hidden_size, width))
        return rows * num_experts * (3 * width + 2 * hidden_size)


def _rows(num_experts: int, hidden_size: int, width: int) -> int:
    """Return the number of tokens of a chunk."""
    return max(1, _CHUNK_NUMBERS // (num_experts * max(2 * width, hidden_size)))


def _log_probabilities(routing: Routing) -> torch.Tensor:
    """Return the logarithm of `Routing.probabilities_TN`, safe where one of them is 0."""
    logits = at_least_float32(routing.logits_TN)
    if routing.moe.weighting.startswith("sigmoid"):
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(-1)


def expert_distances(routing: Routing, target_TH: torch.Tensor, scale: Scale = "fitted") -> torch.Tensor:
    """Return the squared distance of every expert's own output from the target, without gradient.

    O(T F H); memory holds the experts' outputs for one chunk of tokens, and T x N numbers.

    Args:
        routing: The routing with ``inputs_TH``; its layer's experts must be unsharded on this device.
        target_TH: r.
        scale: See `Competitive`.

    Returns:
        ``[T, N]`` of at least float32.
    """
    assert routing.inputs_TH is not None
    with torch.no_grad(), torch.autocast(target_TH.device.type, enabled=False):
        dots, squares = [], []
        for out_NBH, target_BH in _outputs(routing.moe.experts, routing.inputs_TH, target_TH):
            dots.append((out_NBH * target_BH).sum(-1).T)
            squares.append(out_NBH.square().sum(-1).T)
        dots_TN, squares_TN = torch.cat(dots), torch.cat(squares)
        lengths_T1 = at_least_float32(target_TH).square().sum(-1, keepdim=True)
        size = _size(routing, dots_TN, squares_TN, scale)
        return (lengths_T1 - 2 * size * dots_TN + size**2 * squares_TN).clamp_(min=0)


def _size(routing: Routing, dots_TN: torch.Tensor, squares_TN: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return the factor of the experts' bare outputs: ``[T, 1]`` or ``[T, N]``."""
    if scale == "fitted":
        total_T1 = squares_TN.sum(-1, keepdim=True)
        return (dots_TN.sum(-1, keepdim=True) / total_T1).clamp(min=0).where(total_T1 > 0, torch.zeros_like(total_T1))
    logits = at_least_float32(routing.logits_TN)
    weights = {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid}.get(routing.moe.weighting)
    return torch.full_like(dots_TN, routing.moe.factor) * (1.0 if weights is None else weights())


def _outputs(
    experts: Any, inputs_TH: torch.Tensor, target_TH: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for chunks of B tokens the output of each expert at weight 1, ``[N, B, H]``, and the target ``[B, H]``."""
    gate_up, down_NHW = experts.gate_up_proj, at_least_float32(experts.down_proj)
    n, hidden, width = down_NHW.shape
    rows = _rows(n, hidden, width)
    for x_BH, target_BH in zip(torch.split(inputs_TH, rows), torch.split(target_TH, rows), strict=True):
        both = at_least_float32(x_BH.to(gate_up.dtype) @ gate_up.flatten(0, 1).T).view(-1, n, 2 * width)
        h_BNW = experts.act_fn(both[..., :width]) * both[..., width:]
        yield h_BNW.transpose(0, 1) @ down_NHW.transpose(1, 2), at_least_float32(target_BH).to(both.dtype)
