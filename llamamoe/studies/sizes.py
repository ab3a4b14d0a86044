"""Choose number and width of experts, selected experts and shared neurons for a budget.

Everything is counted in neurons: one is three rows of H multiply-adds (gate, up, down), so that a router of N rows
costs N / 3 neurons for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..architectures.sources.base import DenseSpec
from ..conversion.plan import SplitPlan
from ..conversion.sizes import round_up
from ..errors import RefusedError

USUAL_EXPERTS = 24
FFN_PARTS = ("router", "routed", "shared", "stub", "dense_ffn")
"""Parts of `llamamoe.architectures.costs.Cost` that belong to the FFN."""
SHARED_GATE = 1 / 3
"""Cost of the gate of a shared expert (one row)."""
_REACH = 1 / 16  # of F: how far S may move to fill the budget
_STRAY = 0.4  # minimum gain in used neurons per neuron by which S moves


@dataclass(frozen=True)
class Sizes:
    """Sizes of a conversion and their cost.

    Attributes:
        num_experts: N.
        top_k: k.
        expert_width: W, padding included.
        shared: S.
        share: Active multiply-adds per token, router and padding included, as a share of the dense FFN's.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared: int
    share: float


def ffn_share(plan: SplitPlan) -> float:
    """Return the active parameters of all FFNs over the dense ones', routers, padding and stubs included."""
    parent = sum(plan.parent_cost.active.get(part, 0) for part in FFN_PARTS)
    return sum(plan.cost.active.get(part, 0) for part in FFN_PARTS) / parent


def usual_experts(spec: DenseSpec, shared_share: float, pad_to: int = 8) -> int:
    """Return the default number of experts: 24, or the number that a small FFN allows without much padding."""
    routed = round(spec.intermediate_size * (1 - shared_share))
    return max(2, min(USUAL_EXPERTS, routed // (2 * pad_to)))


def sizes_for_budget(
    spec: DenseSpec,
    budget: float,
    num_experts: int | None = None,
    shared_share: float = 0.25,
    pad_to: int = 8,
    *,
    fixed: float = SHARED_GATE,
    multiple: bool = False,
) -> Sizes:
    """Return the sizes that use a budget best: most neurons per token without padding, router included in the cost.

    S may move by a sixteenth of the FFN from the preferred value, if that fills the budget better. O(F / pad_to).

    Args:
        spec: The dense model.
        budget: Maximum active multiply-adds of the FFN per token, as a share of the dense FFN's.
        num_experts: N; None for the number that fills the budget best, near `usual_experts`.
        shared_share: S as a share of F; 0 for no shared neurons.
        pad_to: W is a multiple of this.
        fixed: Additional cost of every token, in neurons: the gate of a shared expert, a stub.
        multiple: Whether S must be a multiple of W (for targets that require it).

    Raises:
        RefusedError: Nothing fits; the message names the smallest sufficient budget.
    """
    size = spec.intermediate_size
    usual = usual_experts(spec, shared_share, pad_to)
    near = range(usual * 3 // 4, usual * 4 // 3 + 1)
    tried = [num_experts] if num_experts else sorted(near, key=lambda experts: abs(experts - usual))
    best: tuple[float, Sizes] | None = None
    least: tuple[float, int] | None = None
    for experts in tried:
        extra = experts / 3 + fixed
        for shared, width in _candidates(size, experts, shared_share, pad_to, multiple):
            least = min(filter(None, (least, (shared + width + extra, experts))))
            top_k = min(experts, int((budget * size - extra - shared + 1e-9) / width))
            if top_k >= 1:
                used = shared + top_k * (size - shared) / experts - _STRAY * abs(shared - shared_share * size)
                share = (shared + top_k * width + extra) / size
                if best is None or used > best[0] + 1e-9:
                    best = used, Sizes(experts, top_k, width, shared, share)
    if best is not None:
        return best[1]
    message = f"{num_experts or usual} experts beside {shared_share:.3g} of {size} shared neurons are not possible"
    if least is not None:
        message = (
            f"a budget of {budget:g} of {size} neurons is too small for {least[1]} experts, one of them selected, "
            f"beside about {shared_share:.3g} shared neurons; the smallest budget is {least[0] / size + 5e-4:.3f}"
        )
    raise RefusedError(
        f"{message}.", hint="Share fewer neurons, or use more (hence narrower) or fewer experts (a smaller router)."
    )


def _candidates(size: int, experts: int, share: float, pad_to: int, multiple: bool) -> Iterator[tuple[int, int]]:
    """Yield pairs of S and W near the preferred ones, the nearest first."""
    if multiple and share > 0:
        widths = {m: round_up(-(-size // (experts + m)), pad_to) for m in range(1, 4 * experts)}
        pairs = [(m * width, width) for m, width in widths.items() if experts <= size - m * width]
        yield from sorted(pairs, key=lambda pair: abs(pair[0] - share * size))[:3]
        return
    wished = round(share * size / pad_to) * pad_to
    reach = max(pad_to, int(_REACH * size) // pad_to * pad_to)
    shared = range(max(wished - reach, pad_to), wished + reach + 1, pad_to) if share > 0 else [0]
    for s in sorted(shared, key=lambda s: abs(s - wished)):
        if experts <= size - s:
            yield s, round_up(-(-(size - s) // experts), pad_to)
