"""Measure the speed of a shape in alternating rounds with the dense model and static pruning."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...conversion.plan import SplitPlan
from ...conversion.recipe import SplitRecipe
from .material import Material
from .runtimes import Load, Runtime
from .shapes import FfnShape, static_recipe

DENSE, STATIC, SHAPE = "dense", "static", "shape"


@dataclass(frozen=True)
class Rate:
    """The speed of one model at one task.

    Attributes:
        tokens_per_second: Median over the rounds.
        ratio: Median over the rounds of its rate over the dense model's in the same round.
        lowest: Minimum of these ratios.
        highest: Maximum of these ratios.
    """

    tokens_per_second: float
    ratio: float
    lowest: float
    highest: float


def rates_of(readings: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Rate]]:
    """Gather readings by model and task.

    Args:
        readings: By model (including ``"dense"``), a reading per round: tokens per second by task.
    """
    found: dict[str, dict[str, Rate]] = {}
    for name, turns in readings.items():
        found[name] = {}
        for task in turns[0]:
            ratios = [turn[task] / dense[task] for turn, dense in zip(turns, readings[DENSE], strict=True)]
            rates = [turn[task] for turn in turns]
            found[name][task] = Rate(statistics.median(rates), statistics.median(ratios), min(ratios), max(ratios))
    return found


def alternate(
    runtime: Runtime, models: Mapping[str, Path], load: Load, turns: int, tell: Callable[[str], None] = lambda _: None
) -> dict[str, list[dict[str, float]]]:
    """Time models in rounds, reversing the order each time, so that drift affects all of them equally."""
    readings: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for turn in range(turns):
        for name in list(models) if turn % 2 == 0 else list(models)[::-1]:
            readings[name].append(runtime.rates(models[name], load))
            tell(f"{runtime.name}: {name}, turn {turn + 1} of {turns}")
    return readings


def measure_shapes(
    material: Material,
    runtime: Runtime,
    shapes: Sequence[FfnShape],
    *,
    load: Load,
    turns: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure shapes, the dense model and static pruning with the same number of active neurons in one run.

    Args:
        material: The dense model and a folder for the others, which are deleted afterwards.
        runtime: The program.
        shapes: The shapes; static ones are only compared with the dense model.
        load: Tasks and their sizes.
        turns: Number of rounds.
        tell: Called after each reading.

    Returns:
        For each shape, JSON-compatible data: sizes, active share, and a `Rate` by model (``dense``, ``static``,
        ``shape``) and task.

    Raises:
        RefusedError: The program cannot run a model, or no target supports it.
        LlamaMoeError: The program failed.
    """
    plans = [material.plan(material.recipe(shape)) for shape in shapes]
    models: dict[str, Path] = {DENSE: runtime.prepare(material.dense, material.work)}
    try:
        for number, plan in enumerate(plans):
            kept = f"{STATIC}-{plan.layout.active_neurons}"
            if plan.layout.num_experts and kept not in models:
                models[kept] = _prepared(material, runtime, static_recipe(plan.layout.active_neurons), kept)
            name = f"{SHAPE}-{number}"
            models[name] = _prepared(material, runtime, material.recipe(shapes[number]), name)
        rates = rates_of(alternate(runtime, models, load, turns, tell))
    finally:
        material.clear()
    facts = {
        "turns": turns,
        "load": asdict(load),
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        **runtime.facts(),
    }
    results = []
    for number, (shape, plan) in enumerate(zip(shapes, plans, strict=True)):
        names = {DENSE: DENSE, SHAPE: f"{SHAPE}-{number}"}
        if plan.layout.num_experts:
            names[STATIC] = f"{STATIC}-{plan.layout.active_neurons}"
        found = {name: rates[key] for name, key in names.items()}
        results.append(_sizes(shape, plan) | {"rates": _plain(found)} | facts)
    return results


def _prepared(material: Material, runtime: Runtime, recipe: SplitRecipe, name: str) -> Path:
    """Return the file that the program loads; the checkpoint is deleted if it is another file."""
    folder = material.convert(recipe, name)
    found = runtime.prepare(folder, folder.parent)
    if found != folder:
        shutil.rmtree(folder)
    return found


def _sizes(shape: FfnShape, plan: SplitPlan) -> dict[str, Any]:
    layout = plan.layout
    names = ("num_experts", "top_k", "expert_width")
    sizes = {name: getattr(layout, name) for name in names} | {"shared": layout.num_shared, "target": plan.target.name}
    share = plan.layout.active_neurons / plan.model.spec.intermediate_size
    return {"shape": shape.to_json(), "sizes": sizes, "active_share": share}


def _plain(rates: Mapping[str, Mapping[str, Rate]]) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {task: asdict(rate) for task, rate in tasks.items()} for name, tasks in rates.items()}


def machine() -> dict[str, Any]:
    """Return the processor and its cores, as far as the system reports them."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"processor": name, "cores": os.cpu_count()}
