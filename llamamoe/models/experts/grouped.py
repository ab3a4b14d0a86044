"""Compute products of groups of tokens with one matrix each, and their gradients.

Autograd through a loop over experts would write a zero tensor of all experts' size for every one of them.
Inputs are gathered and outputs scattered group by group, so that the k copies of a token never exist at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from ...lazy import torch


@dataclass(frozen=True)
class Groups:
    """R assignments of T tokens to experts, those of an expert next to each other.

    Attributes:
        num_tokens: T.
        order_R: int64, position of each in the flattened ``[T, k]``.
        tokens_R: int64, token of each.
        padding_R: bool, repetitions of an assignment that must not count; None if there are none.
        pieces: Expert, first and last + 1 assignment; only experts that have one.
        float32: Convert the factors of a product to float32; the results are rounded to their dtype again.
    """

    num_tokens: int
    order_R: torch.Tensor
    tokens_R: torch.Tensor
    padding_R: torch.Tensor | None
    pieces: tuple[tuple[int, int, int], ...]
    float32: bool = False

    def factor(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the dtype in which products are computed."""
        return matrix.float() if self.float32 else matrix

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``a @ b`` in the dtype of the factors, also under autocast, which ignores ``out=``."""
        a, b = self.factor(a), self.factor(b)
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    def write_product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """Set ``out`` to ``a @ b``."""
        if self.float32:
            out.copy_(self.product(a, b))
        else:
            torch.mm(a, b, out=out)

    def weights_R(self, weights_Tk: torch.Tensor) -> torch.Tensor:
        """Return the weight of each assignment, 0 for padding."""
        weights_R = weights_Tk.reshape(-1).index_select(0, self.order_R)
        return weights_R if self.padding_R is None else weights_R.masked_fill(self.padding_R, 0)


def group_by_expert(indices_Tk: torch.Tensor, num_experts: int, *, pad: bool, float32: bool = False) -> Groups:
    """Sort the assignments by expert; those to expert ``num_experts`` are left out. O(T k log(T k)).

    Args:
        indices_Tk: int64 in ``0 .. num_experts``.
        num_experts: N.
        pad: Whether to pad groups to few distinct sizes by repeating their last assignment.
        float32: See `Groups`.
    """
    indices = indices_Tk.reshape(-1)
    order_R = torch.argsort(indices, stable=True)
    counts_N = torch.bincount(indices, minlength=num_experts)[:num_experts]
    counts = counts_N.tolist()
    sizes = [_few_sizes(count) for count in counts] if pad else counts
    ends = list(accumulate(sizes))
    pieces = tuple((i, end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True)) if size)
    padding_R = None
    if sizes == counts:
        order_R = order_R[: ends[-1]]
    else:
        sizes_N = torch.tensor(sizes, device=indices.device)
        rows = torch.stack((sizes_N.cumsum(0) - sizes_N, counts_N.cumsum(0) - counts_N, counts_N - 1))
        first_R, start_R, last_R = rows.repeat_interleave(sizes_N, dim=1, output_size=ends[-1])
        place_R = torch.arange(ends[-1], device=indices.device) - first_R
        order_R = order_R[start_R + place_R.minimum(last_R)]
        padding_R = place_R > last_R
    tokens_R = order_R.div(max(1, indices_Tk.shape[1]), rounding_mode="floor")
    return Groups(indices_Tk.shape[0], order_R, tokens_R, padding_R, pieces, float32)


def _few_sizes(count: int) -> int:
    """Return the next of 8 sizes per power of two, at most an eighth more: 8, 9, .. 16, 18, .. 32, 36, ..

    For every new shape of a product in bfloat16, oneDNN compiles code, which takes longer than the product itself.
    """
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def gather_linear(x_TI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return ``[R, O]`` in the dtype of ``x_TI``: each assignment's token times the matrix of its expert."""
    out_RO: torch.Tensor = _functions()[0].apply(x_TI, weight_NOI, groups)
    return out_RO


def scatter_linear(x_RI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return ``[T, O]``, at least float32: each assignment's row times its expert's matrix, summed per token."""
    out_TO: torch.Tensor = _functions()[1].apply(x_RI, weight_NOI, groups)
    return out_TO


def _gather(x_TI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
    out_RO = x_TI.new_empty(len(groups.tokens_R), weight_NOI.shape[1])
    for expert, start, stop in groups.pieces:
        x = x_TI.index_select(0, groups.tokens_R[start:stop])
        groups.write_product(x, weight_NOI[expert].T, out_RO[start:stop])
    return out_RO


def _scatter(x_RI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
    dtype = torch.promote_types(x_RI.dtype, torch.float32)
    out_TO = x_RI.new_zeros((groups.num_tokens, weight_NOI.shape[1]), dtype=dtype)
    for expert, start, stop in groups.pieces:
        y = groups.product(x_RI[start:stop], weight_NOI[expert].T)
        out_TO.index_add_(0, groups.tokens_R[start:stop], y.to(dtype))
    return out_TO


def _gather_backward(ctx: Any, grad_RO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x_TI, weight_NOI), groups = ctx.saved_tensors, ctx.groups
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _scatter(grad_RO, weight_NOI.transpose(1, 2), groups).to(x_TI.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.zeros_like(weight_NOI)
        for expert, start, stop in groups.pieces:
            x = x_TI.index_select(0, groups.tokens_R[start:stop])
            groups.write_product(grad_RO[start:stop].T, x, grad_weight[expert])
    return grad_x, grad_weight, None


def _scatter_backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x_RI, weight_NOI), groups = ctx.saved_tensors, ctx.groups
    grad_TO = grad_TO.to(x_RI.dtype)
    grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight_NOI) if ctx.needs_input_grad[1] else None
    for expert, start, stop in groups.pieces:
        grad = grad_TO.index_select(0, groups.tokens_R[start:stop])
        if grad_x is not None:
            groups.write_product(grad, weight_NOI[expert], grad_x[start:stop])
        if grad_weight is not None:
            groups.write_product(grad.T, x_RI[start:stop], grad_weight[expert])
    return grad_x, grad_weight, None


@cache
def _functions() -> tuple[Any, Any]:
    """Return the two products as autograd functions, created here because the registry imports this without torch."""

    class GatherLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_TI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
            ctx.save_for_backward(x_TI, weight_NOI)
            ctx.groups = groups
            return _gather(x_TI, weight_NOI, groups)

        backward = staticmethod(torch.autograd.function.once_differentiable(_gather_backward))  # type: ignore[assignment]

    class ScatterLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_RI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
            ctx.save_for_backward(x_RI, weight_NOI)
            ctx.groups = groups
            return _scatter(x_RI, weight_NOI, groups)

        backward = staticmethod(torch.autograd.function.once_differentiable(_scatter_backward))  # type: ignore[assignment]

    return GatherLinear, ScatterLinear
