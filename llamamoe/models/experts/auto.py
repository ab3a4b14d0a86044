"""`masked` or `sorted`, whichever is faster for the sizes at hand by a rule that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ...lazy import torch
from .base import ExpertsCall, ExpertsImplementation
from .masked import Masked
from .sorted_loop import Sorted


@dataclass(frozen=True)
class Costs:
    """What costs time on a CPU, in the time that one thread takes for one neuron on one token, or as said.

    Fitted by hand to one busy machine with AVX-512 (bfloat16 included, no AMX), on 9 shapes with H = 576 and 2048, N = 8 to
    88, W = 16 to 1024, T = 4 to 2048, forward and forward + backward, and corrected after a run of `benchmarks/experts.py`:
    its shapes are no independent check of the rule. Other processors may want other numbers.

    Attributes:
        read: Reading a neuron's weights and, for `masked`, copying its down projection.
        read_by_expert: Reading a neuron's weights in one of many small products.
        call: The calls for one expert, times H: they do not get faster with more threads, nor longer with H.
        assignment: Gathering and scattering a token once.
        small: How much slower a neuron is in a small product than in a large one.
    """

    call: float
    assignment: float
    small: float
    read: float = 24
    read_by_expert: float = 18


_FLOAT32 = Costs(call=8e5, assignment=16, small=1.0)
_HALF = Costs(call=2.5e6, assignment=24, small=1.15)


class Auto(ExpertsImplementation):
    """Chooses call by call, so that one model decodes with one and trains with the other.

    The rule compares `Costs` of both: ``sorted`` for wide experts and many tokens, ``masked`` for few tokens, and for narrow
    experts of which more than a third is selected. Processor time over the dense MLP's in `benchmarks/experts.py`, 2
    threads, forward + backward (bf16 under autocast), the choice of the rule in stars:

    ======================  =====  ==========  ==========  ==========
    shape                   dtype  masked      sorted      grouped_mm
    ======================  =====  ==========  ==========  ==========
    88 x 16, k=36, T=2048   bf16   *0.99*      1.21        7.15
    88 x 16, k=36, T=512    bf16   *1.02*      2.75        7.12
    88 x 16, k=36, T=2048   fp32   0.96        *0.93*      3.30
    88 x 16, k=36, T=512    fp32   *0.93*      1.10        2.52
    8 x 192, k=4, T=2048    bf16   1.02        *0.71*      1.64
    8 x 192, k=4, T=512     bf16   1.05        *0.91*      1.35
    8 x 192, k=4, T=2048    fp32   1.05        *0.57*      0.73
    8 x 1024, k=2, T=256    bf16   1.10        *0.59*      0.66
    8 x 1024, k=4, T=256    bf16   1.06        *0.72*      1.02
    ======================  =====  ==========  ==========  ==========

    It is not always right. Without gradients its choice took 1.39 times the other's time for one token of 88 x 16, k=36,
    fp32 (1.33 in a run before), and 1.28 times for T=2048 of it (1.01 in the run before).
    """

    name = "auto"
    summary = "masked or sorted, whichever is expected to be faster at this number of tokens and these sizes"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`."""
        tokens, sizes = call.num_tokens, (call.num_experts, call.width, call.top_k, call.hidden_size)
        half = call.x_TH.element_size() <= 2
        if tokens == 1 and not torch.is_grad_enabled():
            loop = one_token_prefers_sorted(*sizes, half=half)
        else:
            loop = prefers_sorted(tokens, *sizes, half=half, threads=torch.get_num_threads())
        return (Sorted() if loop else Masked()).forward(call)


def prefers_sorted(
    tokens: int, num_experts: int, width: int, top_k: int, hidden_size: int, *, half: bool, threads: int
) -> bool:
    """Whether `sorted` is expected to be faster than `masked`, as far as routing is even."""
    costs = _HALF if half else _FLOAT32
    masked = num_experts * width * (tokens + costs.read)
    hit = num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** tokens)
    by_expert = hit * (threads * costs.call / hidden_size + costs.read_by_expert * width)
    return by_expert + tokens * top_k * (costs.small * width + costs.assignment) < masked


def one_token_prefers_sorted(num_experts: int, width: int, top_k: int, hidden_size: int, *, half: bool) -> bool:
    """The same for one token without gradients, where neither sorts, and `masked` copies the selected experts.

    In float32 the loop won on most shapes that were measured, by up to 10 times with wide experts; with narrow ones it lost up
    to 40 % in a run. In half precision a call per expert costs 80 us
    more than a share in the copy, less 0.2 ns for each number copied, and the copy 200 us in all.
    """
    return not half or top_k * (80 - 0.0002 * width * hidden_size) < 200
