"""Sort tokens by expert, and loop over the experts that have any."""

from __future__ import annotations

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation
from .grouped import Groups, gather_linear, group_by_expert, scatter_linear
from .products import float32_products, products_of_a_row

WHOLE = 16 << 20
"""Maximum bytes of float32 inputs that are gathered, and outputs that are scattered, at once."""


class Sorted(ExpertsImplementation):
    """Two matrix products per expert that has tokens; the weights of other experts are not read.

    A token's outputs are summed in float32, whatever the dtype of the inputs.
    """

    name = "sorted"
    summary = "tokens sorted by expert, a loop over the experts that have any: training, prefill, wide experts"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`. O(T k W H)."""
        train = torch.is_grad_enabled()
        if call.num_tokens == 1 and not train:
            return _one_token(call)
        wide = in_float32(call)
        half = call.x_TH.dtype in (torch.bfloat16, torch.float16)
        pad = half and not wide and call.x_TH.device.type == "cpu"
        groups = group_by_expert(call.known_indices_Tk(), call.num_experts, pad=pad, float32=wide)
        if not train:
            whole = all_fit_at_once(call)
            return (_all_at_once if whole else _expert_by_expert)(call, groups)
        hidden_RW = call.activate(gather_linear(call.x_TH, call.gate_up, groups))
        return scatter_linear(hidden_RW * groups.weights_R(call.weights_Tk)[:, None], call.down, groups)


def all_fit_at_once(call: ExpertsCall) -> bool:
    """Return whether the inputs of all assignments are few enough to be gathered together."""
    return 4 * call.num_tokens * call.top_k * call.hidden_size <= WHOLE


def in_float32(call: ExpertsCall) -> bool:
    """Return whether bfloat16 products are computed in float32, as far as routing is even."""
    rows = call.num_tokens * call.top_k / call.num_experts
    return float32_products(call.x_TH, rows, 2 * call.width * call.hidden_size)


def _one_token(call: ExpertsCall) -> torch.Tensor:
    """Return ``[1, H]``, at least float32, without gradients, and without sorting, which would cost more here."""
    x_1H, mm = call.x_TH, torch.mm
    known = [(place, i) for place, i in enumerate(call.indices_Tk[0].tolist()) if 0 <= i < call.num_experts]
    gate_up, down = call.gate_up.transpose(1, 2).unbind(0), call.down.transpose(1, 2).unbind(0)
    hidden_kP, out_kH = x_1H.new_zeros(call.top_k, 2 * call.width), x_1H.new_zeros(call.top_k, call.hidden_size)
    with products_of_a_row(x_1H, 2 * call.width * call.hidden_size):
        rows = hidden_kP.split_with_sizes([1] * call.top_k)
        for place, i in known:
            mm(x_1H, gate_up[i], out=rows[place])
        hidden_rows = call.activate(hidden_kP).split_with_sizes([1] * call.top_k)
        rows = out_kH.split_with_sizes([1] * call.top_k)
        for place, i in known:
            mm(hidden_rows[place], down[i], out=rows[place])
    out_1H = _zeros(call)
    return torch.mm(call.weights_Tk.to(out_1H.dtype), out_kH.to(out_1H.dtype), out=out_1H)


def _all_at_once(call: ExpertsCall, groups: Groups) -> torch.Tensor:
    """Return ``[T, H]``, at least float32, without gradients; all but the products is done for all experts at once."""
    x_RH = groups.factor(call.x_TH).index_select(0, groups.tokens_R)
    hidden_RW = call.activate(_products(x_RH, call.gate_up, groups))
    y_RH = _products(hidden_RW * groups.weights_R(call.weights_Tk)[:, None], call.down, groups)
    out_TH = _zeros(call)
    return out_TH.index_add_(0, groups.tokens_R, y_RH.to(out_TH.dtype))


def _products(x_RI: torch.Tensor, weight_NOI: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return ``[R, O]``: the rows of each expert times its matrix."""
    out_RO = x_RI.new_empty(len(x_RI), weight_NOI.shape[1])
    matrices, sizes, mm = weight_NOI.transpose(1, 2).unbind(0), [b - a for _, a, b in groups.pieces], torch.mm
    if sizes:
        pieces = zip(groups.pieces, x_RI.split_with_sizes(sizes), out_RO.split_with_sizes(sizes), strict=True)
        for (expert, _, _), x, out in pieces:
            mm(x, groups.factor(matrices[expert]), out=out)
    return out_RO


def _expert_by_expert(call: ExpertsCall, groups: Groups) -> torch.Tensor:
    """Return the same, expert by expert, so that its data stay in the caches until its outputs are added."""
    out_TH, x_TH, weights_R = _zeros(call), groups.factor(call.x_TH), groups.weights_R(call.weights_Tk)
    for expert, start, stop in groups.pieces:
        tokens = groups.tokens_R[start:stop]
        hidden = call.activate(groups.product(x_TH.index_select(0, tokens), call.gate_up[expert].T))
        y = groups.product(hidden * weights_R[start:stop, None], call.down[expert].T)
        out_TH.index_add_(0, tokens, y.to(out_TH.dtype))
    return out_TH


def _zeros(call: ExpertsCall) -> torch.Tensor:
    """Return zeros ``[T, H]`` for the sums."""
    dtype = torch.promote_types(call.x_TH.dtype, torch.float32)
    return call.x_TH.new_zeros((call.num_tokens, call.hidden_size), dtype=dtype)
