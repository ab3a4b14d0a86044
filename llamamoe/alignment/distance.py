"""The distance of predictions from the parent's: the loss, whose gradient is computed a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..lazy import torch
from ..models.loading import LOGITS_AT_ONCE

LOGITS_IN_CACHE = 1 << 20
"""Logits that are passed over together, 4 MiB each of the student's and the parent's."""


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
                student_PV = logits(leaf)
            with torch.no_grad():
                at_student_PV, distance = _at_logits(student_PV.detach(), logits(parent))
            total += distance
            if wanted:
                gradients.append(torch.autograd.grad(student_PV, leaf, at_student_PV)[0])
        ctx.save_for_backward(torch.cat(gradients) if wanted else None)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_BH,) = ctx.saved_tensors
        return gradient_BH * grad.to(gradient_BH.dtype), None, None, None


def _at_logits(student_PV: torch.Tensor, parent_PV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient at the student's logits, ``q - p`` in place of the parent's, and the float64 divergence of P tokens.

    The logits are passed over a few rows at a time, which stay in the processor's cache.
    """
    total = student_PV.new_zeros((), dtype=torch.float64)
    rows = max(1, LOGITS_IN_CACHE // student_PV.shape[1])
    for student, parent in zip(torch.split(student_PV, rows), torch.split(parent_PV, rows), strict=True):
        log_q, log_p = student.log_softmax(-1), parent.log_softmax(-1)
        p = torch.exp(log_p, out=parent)
        total += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum(dtype=torch.float64)
        torch.sub(log_q.exp_(), p, out=parent)
    return parent_PV, total
