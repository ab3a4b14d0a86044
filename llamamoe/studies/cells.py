"""Plan the cells of a study from headers alone: every method at every budget with every seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from ..architectures.costs import Cost
from ..architectures.dense_checkpoint import DenseModel
from ..conversion.plan import SplitPlan, plan_split
from ..conversion.recipe import NO_REPAIR
from ..conversion.sizes import PAD_TO
from ..errors import RefusedError, UsageError, near_misses
from ..methods.splitters import SPLITTERS
from ..recipes import Choice
from .by_layer import measuring_flops
from .recipe import BY_LAYER, DENSE, ORACLE, RANDOM, STATIC, CompareRecipe, StudyMethod
from .sizes import SHARED_GATE, ffn_share, sizes_for_budget

SIMULATED = "simulated: cannot be exported"
SIMULATED_K = "simulated: split writes one k for all layers"
ALIGNED = "align"
"""Suffix of the title of an aligned method's control."""
_ATTEMPTS = 4


@dataclass(frozen=True)
class Cell:
    """One measurement of the study.

    Attributes:
        method: Its name in the table.
        kind: Whether it is a requested method or a control.
        budget: Share of the dense FFN's multiply-adds; None for the dense model.
        seed: Seed; None for the dense model.
        plan: Plan of the conversion; None for the dense model.
        oracle: Whether the router is replaced by one with access to every expert's contribution.
        by_layer: The measure by which each layer gets its own k, under the same total; None for one k.
        base: For a simulation the method that it belongs to, else the method itself.
    """

    method: str
    kind: Literal["dense", "method", "control"]
    budget: float | None = None
    seed: int | None = None
    plan: SplitPlan | None = None
    oracle: bool = False
    by_layer: str | None = None
    base: str = ""

    @property
    def simulated(self) -> str | None:
        """The reason why it cannot be stored; None if it can."""
        return SIMULATED if self.oracle else SIMULATED_K if self.by_layer else None

    @property
    def label(self) -> str:
        """Its label ``method/0.5/seed``, which ``--only`` matches; ``dense`` for the dense model."""
        return self.method if self.budget is None else f"{self.method}/{self.budget:g}/{self.seed}"

    @property
    def share(self) -> float:
        """Active multiply-adds of the FFN per token as a share of the dense one's."""
        return 1.0 if self.plan is None else ffn_share(self.plan)


def cells_of(recipe: CompareRecipe, model: DenseModel) -> list[Cell]:
    """Return all cells, the dense model first, then seed by seed, so that a complete picture is available early.

    Raises:
        RefusedError: A method is not possible at a budget; the message names every case.
    """
    cells: list[Cell] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for method in [*recipe.methods, *(_controls(recipe) if recipe.controls else [])]:
        kind: Literal["method", "control"] = "method" if method in recipe.methods else "control"
        for budget in method.budgets or recipe.budgets:
            seeds = recipe.seeds_of(budget)
            for seed in seeds if _routed(method) else seeds[:1]:  # pruning is not random
                try:
                    plan = plan_at(recipe, method, model, budget, seed)
                    _check_by_layer(method, plan)
                except RefusedError as error:
                    reasons.setdefault((method.name, str(error)), []).append(f"{budget:g}")
                    break
                cells.append(Cell(method.name, kind, budget, seed, plan, base=method.name))
                if kind == "method":
                    oracle = recipe.controls and seed == seeds[0]
                    cells += _simulations(cells[-1], oracle, method.top_k_by_layer)
    if reasons:
        lines = [f"  - {name} at {', '.join(budgets)}: {error}" for (name, error), budgets in reasons.items()]
        raise RefusedError("the study is not possible:\n" + "\n".join(lines))
    order = {cell.method: i for i, cell in enumerate(reversed(cells))}
    cells.sort(key=lambda c: (_turn(recipe, c), -order[c.method], -(c.budget or 0)))
    return [Cell(DENSE, "dense", base=DENSE), *cells]


def _simulations(cell: Cell, oracle: bool, by_layer: str | None) -> Iterator[Cell]:
    """Yield the variants of a cell that can only be simulated, if its experts leave a choice."""
    assert cell.plan is not None
    if not cell.plan.layout.num_experts > cell.plan.layout.top_k > 0:
        return
    if oracle:
        yield replace(cell, method=f"{cell.base}, {ORACLE}", kind="control", oracle=True)
    if by_layer:
        yield replace(cell, method=f"{cell.base}, {BY_LAYER}", kind="control", by_layer=by_layer)


def _check_by_layer(method: StudyMethod, plan: SplitPlan) -> None:
    """Refuse a k for each layer where layers cannot be measured.

    Raises:
        RefusedError: The conversion reads no calibration text.
    """
    if method.top_k_by_layer and plan.calibration is None:
        raise RefusedError(
            "top_k_by_layer measures layers on calibration text, but this conversion reads none.",
            hint="Give calibration text, and a method, router or repair that uses it.",
        )


def _turn(recipe: CompareRecipe, cell: Cell) -> int:
    assert cell.budget is not None
    assert cell.seed is not None
    return recipe.seeds_of(cell.budget).index(cell.seed)


def _routed(method: StudyMethod) -> bool:
    choice = method.split_recipe().method.name
    return choice not in SPLITTERS or SPLITTERS.get(choice).routed


def _controls(recipe: CompareRecipe) -> Iterator[StudyMethod]:
    """Yield random experts and router, and static pruning without and with the study's repairs and alignments."""
    static_by = {"name": recipe.static_by.name, **recipe.static_by.options}
    taken = {method.name for method in recipe.methods}
    pruned: dict[str, dict[str, Any]] = {STATIC: {"repair": {"name": NO_REPAIR}}}
    for method in recipe.methods:
        repair, align = _repair_of(method, recipe), method.split_recipe().align
        title = STATIC if repair.name == NO_REPAIR else f"{STATIC} + {repair.name}"
        keys: dict[str, Any] = {"repair": {"name": repair.name, **repair.options}}
        title = _add(pruned, title, keys)
        if align is not None:
            _add(pruned, f"{title} + {ALIGNED}", keys | {"align": align.model_dump(exclude_unset=True)})
    for title, keys in pruned.items():
        if recipe.calibration and title not in taken:
            yield StudyMethod(name=title, recipe={"method": STATIC, "shared_by": static_by} | keys)
    if RANDOM not in taken:
        yield StudyMethod(name=RANDOM, shared_of_active=0.0, recipe={"method": RANDOM, "router": RANDOM})


def _repair_of(method: StudyMethod, recipe: CompareRecipe) -> Choice:
    """Return the method's repair, or its splitter's default for calibrated conversions."""
    split = method.split_recipe()
    splitter = SPLITTERS.get(split.method.name) if split.method.name in SPLITTERS else None
    repair = split.repair
    if repair is None and splitter is not None and splitter.default_repair and recipe.calibration:
        repair = method.split_recipe(repair=splitter.default_repair).repair
    return repair or Choice(name=NO_REPAIR)


def _add(found: dict[str, dict[str, Any]], title: str, keys: dict[str, Any]) -> str:
    """Store keys under a title, numbered if it is taken; return the title, which may exist already."""
    number = 1
    while found.setdefault(name := title if number == 1 else f"{title} {number}", keys) != keys:
        number += 1
    return name


def plan_at(recipe: CompareRecipe, method: StudyMethod, model: DenseModel, budget: float, seed: int) -> SplitPlan:
    """Return the plan of one method at one budget: given sizes, else those that fit the budget best.

    Raises:
        RefusedError: It exceeds the budget, nothing fits, or no target supports it.
    """
    given = {**method.recipe, **method.sizes.get(budget, {})}
    fixed = {key: value for key, value in recipe.calibrated().items() if recipe.calibration} | {"seed": seed}
    size = model.spec.intermediate_size
    if not _routed(method):
        pad_to = int(given.get("pad_to", 1))  # a dense FFN may have any width
        kept = int(budget * size + 1e-9) // pad_to * pad_to
        if kept == 0:
            raise RefusedError(
                f"a budget of {budget:g} of {size} neurons keeps none; the smallest is {pad_to / size:.3f}."
            )
        given.setdefault("shared", kept)
    else:
        given.setdefault("pad_to", PAD_TO)  # narrow steps fill a budget best
    if _routed(method) and "top_k" not in given:
        return _fitted(recipe, method, model, budget, {**given, **fixed})
    plan = plan_split(model, method.split_recipe(**{**given, **fixed}))
    if ffn_share(plan) > budget + 1e-9:
        raise RefusedError(
            f"the given sizes cost {ffn_share(plan):.4f} of the dense FFN, router and padding included, which "
            f"exceeds the budget.",
            hint="Omit top_k: k, and S unless it is given, then follow from the budget.",
        )
    return plan


def _fitted(
    recipe: CompareRecipe, method: StudyMethod, model: DenseModel, budget: float, given: dict[str, Any]
) -> SplitPlan:
    """Find sizes that fit, in up to two rounds, because a target's gates and stubs are only known from a plan."""
    size = model.spec.intermediate_size
    of_active = recipe.shared_of_active if method.shared_of_active is None else method.shared_of_active
    shared = given.get("shared")
    if isinstance(shared, str):
        raise RefusedError(f"shared = {shared!r} needs num_experts and top_k beside it; or give a share or a count.")
    share = of_active * budget if shared is None else shared if isinstance(shared, float) else shared / size
    extra = SHARED_GATE if share > 0 else 0.0
    multiple = False
    for attempt in range(_ATTEMPTS):
        sizes = sizes_for_budget(
            model.spec, budget, given.get("num_experts"), share, given["pad_to"], fixed=extra, multiple=multiple
        )
        chosen = {"num_experts": sizes.num_experts, "top_k": sizes.top_k, "shared": sizes.shared}
        try:
            plan = plan_split(model, method.split_recipe(**{**given, **chosen}))
        except RefusedError:
            if multiple or share == 0 or attempt == _ATTEMPTS - 1:
                raise
            multiple = True  # for targets whose shared expert is a multiple of the others' width
            continue
        if plan.layout.expert_width != sizes.expert_width and not multiple:
            multiple = True  # such a target accepted it, with wider experts
            continue
        if ffn_share(plan) <= budget + 1e-9:
            return plan
        extra += (ffn_share(plan) - sizes.share) * size  # the target's additions beyond the counted ones
    raise RefusedError(f"no sizes were found that cost at most {budget:g} in {plan.target.name}.")


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells whose label or method matches a pattern (``*`` allowed), all of them without patterns.

    Raises:
        UsageError: A pattern matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {cell.label for cell in cells if fnmatchcase(cell.label, pattern) or fnmatchcase(cell.method, pattern)}
        if not found:
            names = list(dict.fromkeys(cell.method for cell in cells))
            raise UsageError(f"--only {pattern!r} matches no cell.", hint=near_misses(pattern.split("/")[0], names))
        chosen |= found
    return [cell for cell in cells if not patterns or cell.label in chosen]


def estimated_flops(cell: Cell, parent: Cost, recipe: CompareRecipe, domains: int) -> int:
    """Estimate the floating-point operations of a cell: calibration as planned, and a pass over the evaluation text.

    A mixture of experts is measured with all its experts computed. ``evaluation_tokens`` null counts as its default.
    """
    tokens = domains * (recipe.evaluation_tokens or 8192)
    steps = (cell.plan.calibration, cell.plan.alignment) if cell.plan else ()
    flops = tokens * parent.flops_per_token + sum(step.flops for step in steps if step is not None)
    return flops + (measuring_flops(cell.plan, cell.by_layer) if cell.plan and cell.by_layer else 0)


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """Return the names of the methods, in order."""
    return list(dict.fromkeys(cell.method for cell in cells))
