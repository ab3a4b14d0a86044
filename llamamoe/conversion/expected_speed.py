"""Estimate the speed of a conversion relative to its parent, from measured shapes and the experts per batch.

The speeds are those of ``benchmarks/shape_speed.py``, kept in ``shape_speed.json`` with their machine, versions and
date.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.moe_layout import MoeLayout
from ..architectures.sources.base import DenseSpec
from ..architectures.targets.clients import runs

TABLE = "shape_speed.json"
BATCHES = (1, 8, 32)
_NEAR_ACTIVE, _NEAR_EXPERTS, _NEAR_SHARED = 0.05, math.log(1.6), 0.15
_SMALLER = 4.0
"""Factor by which an FFN is smaller than the measured one from which its speed is another."""
_WHOLE = 0.95
"""Share of the FFN's weights from which a step counts as reading all of them."""


@dataclass(frozen=True)
class MeasuredShape:
    """A shape whose speed was measured, by one program.

    Attributes:
        program: ``"llama.cpp"`` or ``"transformers"``.
        num_experts: N; 0 for static pruning.
        top_k: k.
        shared: S / F.
        expert_width: W in the measured model.
        active: Active neurons as a share of F.
        ratios: By task (``"decode 1"``, ``"prefill"``): rate relative to the dense model, and its minimum and maximum
            over the rounds.
        static: The same for static pruning with as many active neurons, in the same run; empty for pruning itself.
        model: The name of its model.
        ffn_weights: Weights of a gate, up or down matrix of its dense parent.
        origin: Model, machine, versions and date.
    """

    program: str
    num_experts: int
    top_k: int
    shared: float
    expert_width: int
    active: float
    ratios: dict[str, tuple[float, float, float]]
    static: dict[str, tuple[float, float, float]]
    model: str
    ffn_weights: int
    origin: str

    @property
    def name(self) -> str:
        """Its short description, such as ``12 of 32, 12.5 % shared``."""
        shared = f", {100 * self.shared:.3g} % shared" if self.shared else ""
        return f"{self.top_k} of {self.num_experts}{shared}" if self.num_experts else f"static, {self.shared:.0%}"


@functools.cache
def measured_shapes() -> tuple[MeasuredShape, ...]:
    """Read the table in the package."""
    data = json.loads(Path(__file__).with_name(TABLE).read_text(encoding="utf-8"))
    return tuple(_shape(row) for row in data["rows"])


def _shape(row: dict[str, Any]) -> MeasuredShape:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    model, machine = row["model"]["name"], row["machine"]["processor"]
    return MeasuredShape(
        program=row["program"],
        num_experts=row["shape"]["num_experts"],
        top_k=row["shape"]["top_k"],
        shared=row["shape"]["shared"],
        expert_width=row["sizes"]["expert_width"],
        active=row["active_share"],
        ratios=_ratios(row["rates"]["shape"]),
        static=_ratios(row["rates"].get("static", {})),
        model=model,
        ffn_weights=row["model"]["hidden_size"] * row["model"]["intermediate_size"],
        origin=f"{model} shape, {machine}, {row['threads']} threads, {versions}, {row['measured']}",
    )


def _ratios(rates: dict[str, dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    return {task: (rate["ratio"], rate["lowest"], rate["highest"]) for task, rate in rates.items()}


def experts_touched(num_experts: int, top_k: int, tokens: int) -> float:
    """Return the expected number of experts used by B tokens that each select k of N at random: N (1 - (1 - k/N)^B)."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** tokens)


def weights_read(layout: MoeLayout, spec: DenseSpec, tokens: int) -> float:
    """Return the expected share of the dense FFN's neurons that a decoding step reads for a batch."""
    routed = layout.expert_width * experts_touched(layout.num_experts, layout.top_k, tokens)
    return (layout.shared_width + routed) / spec.intermediate_size


def no_gain_from(layout: MoeLayout, spec: DenseSpec) -> int:
    """Return the batch size from which a step reads nearly the whole FFN, so that decoding gains no speed."""
    tokens = 1
    while weights_read(layout, spec, tokens) < _WHOLE and tokens < 4096:
        tokens += 1
    return tokens


def nearest(layout: MoeLayout, spec: DenseSpec, program: str) -> MeasuredShape | None:
    """Return the measured shape most similar to a conversion, or None if none is similar."""
    size = spec.intermediate_size
    active, shared = layout.active_neurons / size, layout.num_shared / size

    def away(each: MeasuredShape) -> float:
        if bool(each.num_experts) != bool(layout.num_experts):
            return math.inf
        parts = [abs(each.active - active) / _NEAR_ACTIVE]
        if layout.num_experts:
            parts.append(abs(math.log(each.num_experts / layout.num_experts)) / _NEAR_EXPERTS)
            parts.append(abs(each.shared - shared) / _NEAR_SHARED)
        return max(parts) + 0.01 * sum(parts)

    rows = [each for each in measured_shapes() if each.program == program]
    best = min(rows, key=away, default=None)
    return best if best is not None and away(best) <= 1.1 else None


def times_smaller(near: MeasuredShape, spec: DenseSpec) -> float | None:
    """Return how many times smaller the model's FFNs are than the measured ones; None if the sizes are comparable."""
    ratio = near.ffn_weights / (spec.hidden_size * spec.intermediate_size)
    return ratio if ratio >= _SMALLER else None


def expected_speed(layout: MoeLayout, spec: DenseSpec, target: str) -> dict[str, Any]:
    """Return the expectation: by program the nearest measured shape, and by batch size the share that a step reads.

    Programs that do not run the target are left out.
    """
    found: dict[str, Any] = {"measured": [], "batches": []}
    for program in dict.fromkeys(each.program for each in measured_shapes()):
        near = nearest(layout, spec, program)
        if near is not None and runs(program, target):
            found["measured"].append(
                {
                    "program": program,
                    "shape": near.name,
                    "model": near.model,
                    "times_smaller": times_smaller(near, spec),
                    "over_dense": {task: list(values) for task, values in near.ratios.items()},
                    "static_over_dense": {task: list(values) for task, values in near.static.items()},
                    "origin": near.origin,
                }
            )
    if layout.num_experts:
        for tokens in BATCHES:
            touched = experts_touched(layout.num_experts, layout.top_k, tokens)
            found["batches"].append(
                {"tokens": tokens, "experts_touched": touched, "weights_read": weights_read(layout, spec, tokens)}
            )
        found["no_gain_from_batch"] = no_gain_from(layout, spec)
    return found
