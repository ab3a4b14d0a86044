"""Simulate a conversion whose number of selected experts differs by layer, under the same total as one k for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.compute import Compute
from ..calibration.text import CalibrationText
from ..conversion.plan import SplitPlan, plan_split
from ..progress import Progress
from .budget.search import share_out_top_k
from .budget.sensitivities import SENSITIVITIES
from .budget.sensitivities.base import Task, pass_flops
from .sizes import ffn_share

_POINTS = (0.5, 1.0, 1.5)
"""Multiples of k at which a converting measure converts each layer."""


@dataclass(frozen=True)
class LayerPlans:
    """A conversion with its own k in every layer.

    Attributes:
        plans: The plan of each layer: the study's, with another k.
        facts: The choice as JSON-compatible data: ``top_k_by_layer``, ``measure``, ``damage`` and ``damage_uniform``.
    """

    plans: tuple[SplitPlan, ...]
    facts: dict[str, Any]

    @property
    def share(self) -> float:
        """Mean active share of the FFNs' multiply-adds."""
        return sum(map(ffn_share, self.plans)) / len(self.plans)


def measure_layers(
    plan: SplitPlan,
    measure: str,
    text: CalibrationText,
    compute: Compute,
    folder: Path,
    advance: Callable[[float], None] = lambda share: None,
) -> LayerPlans:
    """Measure each layer's loss by its k as `llamamoe.budget` does, and choose k for every layer.

    The sum of k over the layers is at most that of the plan; given the measured curves the choice is optimal.

    Args:
        plan: The conversion with one k for all layers.
        measure: A name in `SENSITIVITIES`.
        text: The calibration text.
        compute: Device and dtype.
        folder: An existing folder for large files.
        advance: Called with the finished share.

    Raises:
        LlamaMoeError: Values are not finite, or there is too little text.
    """
    top_k = plan.layout.top_k
    by_k = {k: with_top_k(plan, k) for k in range(1, plan.layout.num_experts + 1)}
    shares = [ffn_share(each) for each in by_k.values()]
    points = [by_k[k] for k in _measured(plan, measure) if shares[k - 1] < 1]
    how = SENSITIVITIES.get(measure)()

    def report(progress: Progress) -> None:
        advance(progress.done / progress.total)

    task = Task(tuple(points), tuple(map(ffn_share, points)), text, compute, folder, progress=report)
    curves = how.measure(task)
    chosen, damage = share_out_top_k(curves, shares, top_k)
    facts = {
        "measure": measure,
        "top_k_by_layer": list(chosen),
        "damage": damage,
        "damage_uniform": float(curves.at(shares[top_k - 1]).sum()),
    }
    return LayerPlans(tuple(by_k[k] for k in chosen), facts)


def with_top_k(plan: SplitPlan, top_k: int) -> SplitPlan:
    """Return a plan with another k, and the factors that follow from it."""
    return (
        plan if top_k == plan.layout.top_k else plan_split(plan.model, plan.recipe.model_copy(update={"top_k": top_k}))
    )


def measuring_flops(plan: SplitPlan, measure: str) -> int:
    """Return an estimate of the floating-point operations of `measure_layers`, without sampling text."""
    assert plan.calibration is not None
    count = plan.model.spec.num_layers
    if not SENSITIVITIES.get(measure).converts:
        return plan.recipe.calibration_tokens * count * pass_flops(plan)
    passes = Task.held_out_tokens * pass_flops(plan) * count * (count + 1) // 2
    return len(_measured(plan, measure)) * (plan.calibration.flops + passes)


def _measured(plan: SplitPlan, measure: str) -> Sequence[int]:
    """Return the values of k at which layers are measured, ascending."""
    top_k, most = plan.layout.top_k, plan.layout.num_experts
    if not SENSITIVITIES.get(measure).converts:
        return [top_k]
    return sorted({min(most, max(1, round(point * top_k))) for point in _POINTS})
