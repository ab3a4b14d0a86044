"""`masked`, `sorted` or `grouped_mm`, whichever is faster for the given sizes by a measured rule."""

from __future__ import annotations

from dataclasses import dataclass

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation
from .grouped_mm import GroupedMm
from .masked import Masked
from .products import has_amx
from .sorted_loop import Sorted, all_fit_at_once, in_float32


@dataclass(frozen=True)
class Costs:
    """Costs on a CPU, in units of the time that `masked` takes to read one weight with two threads.

    Fitted to a Xeon with AVX-512 (bfloat16 included, no AMX): in 60 of 63 measured cases the rule chose the faster of
    the two, or one within 3 % of it; on the others it lost 13 to 38 %. H = 576 and 2048, N = 8 to 64, W = 24 to 896, T
    = 2 to 256, without gradients. "half by AMX" was fitted to a Xeon that has it: faster or within 3 % in 50 of 52 cases
    (W = 16 to 896, T = 2 to 2048), 9 % lost in the others. Other processors may need other values.

    Attributes:
        call: Calls for one expert, which more threads do not speed up.
        read: Reading one weight in one of many small products.
        product: One weight and one token in such a product.
        masked: One weight and one token in the products of `masked`.
        assignment: Gathering, or scattering, one element of a token for an expert.
    """

    call: float
    read: float
    product: float
    masked: float
    assignment: float = 1.0


COSTS = {
    "float32": Costs(call=2.1e5, read=0.52, product=0.064, masked=0.038),
    "half": Costs(call=1.82e6, read=0.86, product=0.076, masked=0.102),
    "half in float32": Costs(call=1.3e6, read=4.0, product=0.052, masked=0.2),
    "half by AMX": Costs(call=6e5, read=1.3, product=0.0214, masked=0.02, assignment=11.0),
}


def costs_on(device_type: str, *, half: bool, in_float32: bool = False) -> Costs:
    """Return the costs of experts in 16 bits or in float32 on this machine's device.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        half: Whether inputs and weights have 16 bits.
        in_float32: Whether they are multiplied in float32 nevertheless.
    """
    if not half:
        return COSTS["float32"]
    if in_float32:
        return COSTS["half in float32"]
    return COSTS["half by AMX" if device_type == "cpu" and has_amx() else "half"]


class Auto(ExpertsImplementation):
    """A choice made for every call, so that a model can decode with one and train with the other.

    The rule compares `Costs` of both: ``sorted`` for wide experts and many tokens, ``masked`` for few tokens and narrow
    experts. Small float32 calls without gradients that it would sort go to ``grouped_mm``, which spends less time in
    Python (0.1 ms of 0.5 for 4 tokens and 8 experts of 168 neurons, hidden 576). `benchmarks/experts.py` measures the
    rule against transformers' own implementations.
    """

    name = "auto"
    summary = (
        "masked, sorted or grouped_mm, whichever is expected to be faster at this number of tokens and these sizes"
    )

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`."""
        tokens, sizes = call.num_tokens, (call.num_experts, call.width, call.top_k, call.hidden_size)
        half = call.x_TH.element_size() <= 2
        if tokens == 1 and not torch.is_grad_enabled():
            loop = one_token_prefers_sorted(*sizes, half=half)
        else:
            costs = costs_on(call.x_TH.device.type, half=half, in_float32=in_float32(call))
            loop = prefers_sorted(tokens, *sizes, costs=costs, threads=torch.get_num_threads())
        if loop and tokens > 1 and not half and not torch.is_grad_enabled() and all_fit_at_once(call):
            return GroupedMm().forward(call)
        return (Sorted() if loop else Masked()).forward(call)


def prefers_sorted(
    tokens: int, num_experts: int, width: int, top_k: int, hidden_size: int, *, costs: Costs, threads: int
) -> bool:
    """Return whether `sorted` is expected to be faster than `masked`, as far as routing is even."""
    numbers = 3 * width * hidden_size
    hit = num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** tokens)
    by_expert = hit * (costs.call * threads / 2 + costs.read * numbers)
    by_expert += tokens * top_k * (numbers * costs.product + hidden_size * costs.assignment)
    return by_expert < num_experts * numbers * (1 + tokens * costs.masked)


def one_token_prefers_sorted(num_experts: int, width: int, top_k: int, hidden_size: int, *, half: bool) -> bool:
    """Return the same for one token without gradients, where neither sorts, and `masked` copies the selected experts.

    A call per expert costs about 20 us more than its share of the copy, which costs 75 us plus 0.1 ns per byte.
    """
    microseconds = 20 - 1e-4 * (2 if half else 4) * 3 * width * hidden_size
    return top_k * microseconds < 75
