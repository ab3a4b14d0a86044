"""Tokens sorted by expert, and a loop over the experts that have any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation
from .grouped import gather_linear, group_by_expert, scatter_linear


class Sorted(ExpertsImplementation):
    """Two matrix products per expert that has tokens; the weights of other experts are not read.

    A token's outputs are summed in float32, whatever the dtype of the inputs.
    """

    name = "sorted"
    summary = "tokens sorted by expert, a loop over the experts that have any: training, prefill, wide experts"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`. O(T k W H)."""
        if call.num_tokens == 1 and not torch.is_grad_enabled():
            return _one_token(call)
        half = call.x_TH.dtype in (torch.bfloat16, torch.float16)
        groups = group_by_expert(call.known_indices_Tk(), call.num_experts, pad=half and call.x_TH.device.type == "cpu")
        hidden_RW = call.activate(gather_linear(call.x_TH, call.gate_up, groups))
        return scatter_linear(hidden_RW * groups.weights_R(call.weights_Tk)[:, None], call.down, groups)


def _one_token(call: ExpertsCall) -> torch.Tensor:
    """``[1, H]``, at least float32, without gradients: sorting and scattering would cost more than the products here."""
    dtype = torch.promote_types(call.x_TH.dtype, torch.float32)
    out_1H = call.x_TH.new_zeros((1, call.hidden_size), dtype=dtype)
    with _products_of_a_row(call.x_TH):
        for expert, weight in zip(call.indices_Tk[0].tolist(), call.weights_Tk[0].tolist(), strict=True):
            if 0 <= expert < call.num_experts:
                hidden_1W = call.activate(torch.nn.functional.linear(call.x_TH, call.gate_up[expert]))
                out_1H.add_(torch.nn.functional.linear(hidden_1W, call.down[expert]), alpha=weight)
    return out_1H


@contextmanager
def _products_of_a_row(x_TH: torch.Tensor) -> Iterator[None]:
    """How a bfloat16 row is multiplied on a CPU: by torch's own kernel, which reads a matrix about 1.5 times as fast.

    oneDNN, torch's first choice, was made for many rows: 22 GB/s against 33 for one row and 4 to 8 MB, two threads. It is
    switched for the whole process, so only where no other thread computes; those that end with the process do not count
    (progress bars).
    """
    backends: Any = torch.backends  # whose types know no setter
    switch = backends.mkldnn
    fits = x_TH.dtype == torch.bfloat16 and x_TH.device.type == "cpu" and switch.enabled
    if not fits or torch.compiler.is_compiling() or backends.flags_frozen() or not _alone():
        yield
        return
    switch.enabled = False
    try:
        yield
    finally:
        switch.enabled = True


def _alone() -> bool:
    return sum(not thread.daemon for thread in threading.enumerate()) == 1 and not threading.current_thread().daemon
