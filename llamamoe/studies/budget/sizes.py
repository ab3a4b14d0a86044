"""Find sizes of a converted layer that cost at most a share of its FFN, in targets that support them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...architectures.dense_checkpoint import DenseModel, stored_dtype
from ...architectures.moe_layout import MoeLayout
from ...architectures.targets import TARGETS
from ...architectures.targets.base import Target
from ...conversion.calibration_cost import plan_calibration
from ...conversion.defaults import complete
from ...conversion.plan import SplitPlan, plan_split
from ...conversion.recipe import DTYPES, SplitRecipe
from ...conversion.sizes import PAD_TO, candidate_targets, choose_target
from ...errors import RefusedError
from ..sizes import SHARED_GATE, Sizes, sizes_for_budget

_ATTEMPTS = 4
_STEPS = 200  # number of budgets tried to find the smallest
_FORMS = ("none", "leading", "ends", "any")


class Sizer:
    """A search for the sizes of a converted layer that cost at most a share, in a target.

    Args:
        model: The dense model.
        recipe: Its ``num_experts`` and ``shared`` are kept if given.
        shared_of_active: Share of the active neurons that are shared otherwise.

    Raises:
        RefusedError: The method has no experts, or they are copies.
    """

    def __init__(self, model: DenseModel, recipe: SplitRecipe, shared_of_active: float) -> None:
        self.model, self.asked = model, recipe
        # Narrow steps fill a budget best.
        recipe = recipe.model_copy(update={"pad_to": recipe.pad_to or PAD_TO})
        self.chosen = complete(recipe, model.spec.intermediate_size)
        self.recipe, self.method = self.chosen.recipe, self.chosen.splitter
        self.dtype = DTYPES[recipe.dtype] if recipe.dtype else stored_dtype(model)
        self.experts = recipe.num_experts if "num_experts" in recipe.model_fields_set else None
        self.shared_of_active = shared_of_active
        splitter = self.splitter = self.method(self.method.Options.model_validate(self.recipe.method.options))
        experts = self.recipe.num_experts
        if not splitter.routed or splitter.parts(experts) != experts:
            made = "copies of the FFN" if splitter.routed else "no experts"
            raise RefusedError(f"{splitter.name} makes {made}: there is no budget to distribute among layers.")
        if isinstance(recipe.shared, str):
            raise RefusedError(
                f"shared = {recipe.shared!r} needs a fixed number of experts.",
                hint="Give a share or a count, or omit it.",
            )

    def targets(self, budget: float) -> list[Target]:
        """Return the targets that support converting all layers alike at a budget, the preferred first.

        Other targets are included only if more layers can stay dense in them.

        Raises:
            RefusedError: No target fits; the message gives the reasons and the smallest budget.
        """
        fitting: list[Target] = []
        reasons: list[RefusedError] = []
        for target in self._candidates():
            try:
                self.fit(target, budget)
                fitting.append(target)
            except RefusedError as error:
                reasons.append(error)
        if not fitting:
            raise self._refusal(reasons, budget)
        fitting.sort(key=lambda each: -len(each.majors(self.model.spec)))
        forms = [_FORMS.index(each.dense_layers) for each in fitting]
        return [each for i, each in enumerate(fitting) if i == 0 or forms[i] > max(forms[:i])]

    def _candidates(self) -> list[Target]:
        asked = self.asked.shared
        shared = bool(self.shared_of_active if asked is None else asked)
        return [TARGETS.get(name)() for name in candidate_targets(self.asked, self.splitter, int(shared))]

    def _refusal(self, reasons: Sequence[RefusedError], budget: float) -> RefusedError:
        """Return the refusal if nothing fits: the smallest sufficient budget, or else every target's reason."""
        least: tuple[float, str] | None = None
        for target in self._candidates():
            for step in range(1, _STEPS):
                try:
                    cost = math.ceil(1000 * self.fit(target, step / _STEPS).share) / 1000
                except RefusedError:
                    continue
                least = min(filter(None, (least, (max(cost, step / _STEPS), target.name))))
                break
        if least is None or least[0] <= budget:
            lines = dict.fromkeys(str(reason.message) for reason in reasons)
            return RefusedError("\n".join(lines), hint=reasons[0].hint)
        name = self.splitter.name
        return RefusedError(
            f"a budget of {budget:g} is too small for {name}: the smallest possible one is {least[0]:g} ({least[1]}).",
            hint="Fewer shared neurons, or another number of --experts, may allow less.",
        )

    def fit(self, target: Target, budget: float) -> Sizes:
        """Return the sizes that use a share best, with their cost in the target, stubs and gates included.

        Raises:
            RefusedError: Nothing fits, or the target does not support it.
        """
        spec, size = self.model.spec, self.model.spec.intermediate_size
        asked = self.asked.shared
        assert not isinstance(asked, str)
        if asked is None:
            share = 0.0 if target.shared in ("none", "one") else self.shared_of_active * budget
        else:
            share = asked if isinstance(asked, float) else asked / size
        extra = SHARED_GATE if share > 0 else 0.0
        multiple = target.shared == "multiple" and share > 0
        for _ in range(_ATTEMPTS):
            sizes = sizes_for_budget(
                spec, budget, self.experts, share, self.recipe.pad_to or PAD_TO, fixed=extra, multiple=multiple
            )
            layout = choose_target(spec, self.recipe_for(target, sizes, ()), self.method, self.dtype)[1]
            cost = layer_share(target, self.model, layout)
            if cost <= budget + 1e-9:
                return replace(sizes, share=cost, expert_width=layout.expert_width)
            extra += (cost - budget) * size + 1e-3
        raise RefusedError(f"no sizes were found that cost at most {budget:g} of an FFN in {target.name}.")

    def recipe_for(self, target: Target, sizes: Sizes, dense: tuple[int, ...]) -> SplitRecipe:
        """Return the recipe with these sizes and dense layers."""
        values = {"num_experts": sizes.num_experts, "top_k": sizes.top_k, "shared": sizes.shared}
        return self.recipe.model_copy(update={**values, "target": target.name, "keep_dense": dense})

    def plan(self, target: Target, sizes: Sizes) -> SplitPlan:
        """Plan all layers converted alike, with sizes of calibration even if no method needs text."""
        plan = plan_split(self.model, self.recipe_for(target, sizes, ()))
        needed = plan.calibration or plan_calibration(self.model.spec, self.chosen, plan.layout)
        return replace(plan, calibration=needed)


def layer_share(target: Target, model: DenseModel, layout: MoeLayout) -> float:
    """Return a converted FFN's active multiply-adds over the dense one's, router, padding and stub included."""
    spec = model.spec
    active = sum(
        math.prod(tensor.shape) * (layout.active_share if tensor.role == "routed" else 1.0)
        for tensor in target.moe_tensors(spec, layout, 0)
    )
    return active / (3 * spec.hidden_size * spec.intermediate_size)
