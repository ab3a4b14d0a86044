"""The distance of predictions from the parent's: the loss, whose gradient is computed a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..lazy import torch
from ..models.loading import LOGITS_AT_ONCE


def divergence(
    hidden_BH: torch.Tensor, parent_BH: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> torch.Tensor:
    """Return ``KL(parent || student)`` of the next token, in nats, summed over B tokens.

    Differentiable in ``hidden_BH``.

    The logits of a chunk are computed once: the gradient at the hidden states is stored in their place.

    Reference: Hinton, Vinyals and Dean (arXiv:1503.02531), at temperature 1.

    Args:
        hidden_BH: Output of the student's last layer.
        parent_BH: Output of the parent's last layer, without gradient.
        logits: Final norm and head: ``[b, H]`` to float32 ``[b, V]``.
        vocab_size: V.
    """
    out: torch.Tensor = _Divergence.apply(hidden_BH, parent_BH, logits, max(1, LOGITS_AT_ONCE // vocab_size))  # type: ignore[no-untyped-call]
    return out


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BH: torch.Tensor, parent_BH: torch.Tensor, logits: Any, rows: int) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        total, gradients = hidden_BH.new_zeros((), dtype=torch.float64), []
        for hidden, parent in zip(torch.split(hidden_BH, rows), torch.split(parent_BH, rows), strict=True):
            leaf = hidden.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                log_q = logits(leaf).log_softmax(-1)
            with torch.no_grad():
                log_p = logits(parent).log_softmax(-1)
                p = log_p.exp()
                total += torch.linalg.vecdot(p, log_p - log_q).sum(dtype=torch.float64)
            if wanted:
                gradients.append(torch.autograd.grad(log_q, leaf, -p)[0])
        ctx.save_for_backward(torch.cat(gradients) if wanted else None)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_BH,) = ctx.saved_tensors
        return gradient_BH * grad.to(gradient_BH.dtype), None, None, None
