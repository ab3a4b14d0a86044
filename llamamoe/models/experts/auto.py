"""`masked`, `sorted` or `grouped_mm`, whichever is faster for the sizes at hand by a rule that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation
from .grouped_mm import GroupedMm
from .masked import Masked
from .sorted_loop import Sorted, all_fit_at_once, in_float32


@dataclass(frozen=True)
class Costs:
    """What costs time on a CPU, in the time that `masked` takes to read a number of the weights with two threads.

    Fitted to a Xeon with AVX-512 (bfloat16 included, no AMX): on 60 of 63 measured cases the rule chose the faster of the two,
    or one within 3 % of it; on the others it lost 13 to 38 %. H = 576 and 2048, N = 8 to 64, W = 24 to 896, T = 2 to 256,
    without gradients. Other processors may want other numbers.

    Attributes:
        call: The calls for one expert; they do not get faster with more threads.
        read: Reading a number of the weights in one of many small products.
        product: A number and a token in such a product.
        masked: A number and a token in the products of `masked`.
        assignment: Gathering, or scattering, a number of a token for an expert.
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
}


class Auto(ExpertsImplementation):
    """Chooses call by call, so that one model decodes with one and trains with the other.

    The rule compares `Costs` of both: ``sorted`` for wide experts and many tokens, ``masked`` for few tokens and narrow
    experts. Small float32 calls without gradients that it would sort go to ``grouped_mm``, which spends less time in Python
    (0.1 ms of 0.5 for 4 tokens and 8 experts of 168 neurons, hidden 576). `benchmarks/experts.py` has what the rule is worth
    beside transformers' own implementations.
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
            costs = COSTS["half in float32" if in_float32(call) else "half" if half else "float32"]
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

    A call per expert costs some 20 us more than a share in the copy, which costs 0.1 ns for each byte and 75 us in all.
    """
    microseconds = 20 - 1e-4 * (2 if half else 4) * 3 * width * hidden_size
    return top_k * microseconds < 75
