"""`masked` or `sorted`, whichever is faster for the sizes at hand by a rule that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import ExpertsCall, ExpertsImplementation
from .masked import Masked
from .sorted_loop import Sorted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Costs:
    """What costs time on a CPU, in the time that one thread takes for one neuron on one token, or as said.

    Fitted by hand to one machine with AVX-512 (bfloat16 included, no AMX), on 9 shapes with H = 576 and 2048, N = 8 to 88,
    W = 16 to 1024, T = 4 to 2048, forward and forward + backward.

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

    The rule compares `Costs` of both. It says ``sorted`` for wide experts, for float32, and for many tokens with a small
    share selected; ``masked`` for few tokens, and in bfloat16 for experts of few neurons of which more than a third is
    selected.
    """

    name = "auto"
    summary = "masked or sorted, whichever is expected to be faster at this number of tokens and these sizes"

    def forward(self, call: ExpertsCall) -> torch.Tensor:
        """See `ExpertsImplementation.forward`."""
        import torch

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

    In float32 a loop over the selected experts is never much slower. In half precision a call per expert costs 80 us
    more than a share in the copy, less 0.2 ns for each number copied, and the copy 200 us in all.
    """
    return not half or top_k * (80 - 0.0002 * width * hidden_size) < 200
