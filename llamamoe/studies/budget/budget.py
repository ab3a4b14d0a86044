"""``llamamoe.budget``: choose under one global budget which layers stay dense, and the sizes of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...architectures.dense_checkpoint import understand
from ...architectures.expert_weighting import routes_attention
from ...architectures.targets.base import Target
from ...checkpoint.locate import locate, open_checkpoint
from ...checkpoint.scratch import scratch_folder
from ...conversion.plan import SplitPlan, plan_split
from ...conversion.recipe import SplitRecipe
from ...conversion.sizes import PAD_TO
from ...errors import RefusedError, UsageError
from ...progress import ProgressCallback, ignore_progress
from ..sizes import Sizes
from .search import DenseSet, dense_sets, least_damage, share_out
from .sensitivities import SENSITIVITIES
from .sensitivities.base import Task
from .sensitivities.curves import Curves
from .sizes import Sizer

SIMULATED = "simulated: no architecture of transformers supports it"
SMALLER = 0.75
"""Ratio of successive shares at which layers are converted for a measurement, starting from the budget."""
_GRID = 64


@dataclass(frozen=True)
class LayerBudget:
    """The budget of one layer.

    Attributes:
        layer: Its index.
        dense: Whether it stays dense.
        damage_uniform: Damage if all layers are converted alike.
        damage: Damage in the allocation; 0 if it stays dense.
        simulated_shared: Shared neurons if every layer could have its own number (F: dense); None if nothing fits.
    """

    layer: int
    dense: bool
    damage_uniform: float
    damage: float
    simulated_shared: int | None


@dataclass(frozen=True)
class Allocation:
    """The result of `budget`.

    Attributes:
        source: The dense model.
        budget: Maximum mean active share of the FFNs.
        measure: The measure of sensitivity.
        unit: Unit of damages.
        target: The architecture that supports it.
        dense_form: The layers that can stay dense in that architecture.
        keep_dense: Layers that stay dense, ascending.
        num_experts: N of the other layers.
        top_k: k.
        expert_width: W, padding included.
        shared: S.
        layer_share: Active multiply-adds of one converted layer, router, padding and stubs included, over a dense
            one's.
        active_share: The mean over all layers; at most the budget.
        damage: Sum over the converted layers.
        damage_uniform: The same if no layer stays dense.
        layers: Budgets layer by layer.
        by_count: For every number of dense layers the best set: layers, layer_share, active_share, damage.
        simulated: The damage with a different number of shared neurons in every layer, which cannot be stored.
        measured: The measured curves.
        flops: Estimate of the floating-point operations of the measurement.
        recipe: Recipe for `llamamoe.split`.
        warnings: Sentences for the user.
    """

    source: str
    budget: float
    measure: str
    unit: str
    target: str
    dense_form: str
    keep_dense: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_width: int
    shared: int
    layer_share: float
    active_share: float
    damage: float
    damage_uniform: float
    layers: tuple[LayerBudget, ...]
    by_count: tuple[dict[str, Any], ...]
    simulated: dict[str, Any]
    measured: dict[str, Any]
    flops: int
    recipe: SplitRecipe
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the allocation as JSON-compatible data."""
        data = {key: value for key, value in vars(self).items() if key not in ("layers", "recipe")}
        layers = [asdict(layer) for layer in self.layers]
        return {"llamamoe": __version__, **data, "layers": layers, "recipe": self.recipe.model_dump(mode="json")}

    def to_yaml(self) -> str:
        """Return the recipe for ``llamamoe split --recipe``, with its rationale in comments."""
        layers = ", ".join(map(str, self.keep_dense)) or "none"
        about = (
            f"# By llamamoe {__version__}: {100 * self.active_share:.2f} % of the FFNs' multiply-adds are active (budget "
            f"{100 * self.budget:g} %).\n# Dense layers: {layers}; damage by {self.measure} {self.damage:.4g} {self.unit} "
            f"(no dense layer: {self.damage_uniform:.4g}).\n"
        )
        return about + self.recipe.to_yaml()


def budget(
    source: str | Path,
    recipe: SplitRecipe,
    budget: float,
    *,
    measure: str = "proxy",
    shared_of_active: float = 0.5,
    points: int = 2,
    held_out_tokens: int = 4096,
    tokenizer: str | Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Allocation:
    """Choose dense layers and sizes under one budget, from the measured sensitivity of every layer.

    All converted layers have the same sizes, as every architecture of transformers requires, so the only
    choice is which layers stay dense: each takes its whole FFN out of the budget, and the others get less. Damages of
    single layers are added up and follow power laws between and beyond the measured shares (see `Curves`); given
    those, the choice is optimal among all that the target supports.

    Args:
        source: A folder, a ``.gguf`` file or a hub id.
        recipe: Conversion of a layer. Its ``calibration`` is the text to measure on; ``num_experts`` and ``shared``
            are kept if they are given, ``top_k`` and ``keep_dense`` are chosen here.
        budget: Maximum active multiply-adds of the FFNs per token, router, padding and stubs included, as a share of
            the dense FFNs'.
        measure: A name in `SENSITIVITIES`.
        shared_of_active: Share of the active neurons that are shared, unless the recipe sets their number.
        points: Number of shares at which a measure converts layers.
        held_out_tokens: Maximum number of tokens on which outputs are compared.
        tokenizer: For a GGUF source, a folder whose tokenizer files replace the vocabulary in the file.
        progress: Called after every layer.

    Raises:
        RefusedError: The budget is too small (the message names the smallest), or the method has no experts.
        UsageError: An argument is out of range, or there is no calibration text.
        LlamaMoeError: The text cannot be read, or values are not finite.
    """
    _check(recipe, budget, shared_of_active, points, held_out_tokens)
    how = SENSITIVITIES.get(measure)()
    checkpoint = open_checkpoint(locate(source), tokenizer=tokenizer)
    sizer = Sizer(understand(checkpoint), recipe, shared_of_active)
    targets = sizer.targets(budget)
    shares = [budget * SMALLER**i for i in reversed(range(points))] if how.converts else [budget]
    with scratch_folder() as folder:
        task = _task(sizer, targets[0], shares, folder, held_out_tokens, progress)
        curves, flops = how.measure(task), how.flops(task)
    sets = {each: dense_sets(curves, budget, each.dense_layers, partial(sizer.fit, each)) for each in targets}
    told = {"source": str(source), "budget": budget, "measure": measure, "unit": how.unit, "flops": flops}
    return _allocation(sizer, sets, curves, told, task.text.warnings)


def _allocation(
    sizer: Sizer,
    sets: Mapping[Target, Sequence[DenseSet]],
    curves: Curves,
    told: dict[str, Any],
    warnings: Sequence[str],
) -> Allocation:
    """Return the best target's best set of dense layers; ``told`` are the fields without a choice."""
    target = min(sets, key=lambda each: least_damage(sets[each]).damage)  # the first of equal ones
    uniform, chosen = sets[target][0].sizes, least_damage(sets[target])
    recipe = sizer.recipe_for(target, chosen.sizes, chosen.layers)
    plan = plan_split(sizer.model, recipe)
    return Allocation(
        **told,
        target=target.name,
        dense_form=target.dense_layers,
        keep_dense=chosen.layers,
        num_experts=chosen.sizes.num_experts,
        top_k=chosen.sizes.top_k,
        expert_width=chosen.sizes.expert_width,
        shared=chosen.sizes.shared,
        layer_share=chosen.sizes.share,
        active_share=chosen.share,
        damage=chosen.damage,
        damage_uniform=sets[target][0].damage,
        **_by_layer(
            curves, chosen, uniform, told["budget"], sizer.model.spec.intermediate_size, sizer.recipe.pad_to or PAD_TO
        ),
        by_count=tuple(_alternative(each) for each in sets[target]),
        measured=curves.to_json(),
        recipe=recipe,
        warnings=(*plan.warnings, *warnings, *_notes(target)),
    )


def _check(recipe: SplitRecipe, budget: float, shared_of_active: float, points: int, held_out_tokens: int) -> None:
    if not 0 < budget < 1:
        raise UsageError(f"The budget is {budget:g}, but must be a share between 0 and 1, such as 0.5.")
    if not 0 <= shared_of_active < 1:
        raise UsageError(f"shared_of_active is {shared_of_active:g}, but must be at least 0 and below 1.")
    if not 1 <= points <= 4:
        raise UsageError(f"points is {points}, but must be 1 to 4.")
    if held_out_tokens < 2:
        raise UsageError(f"held_out_tokens is {held_out_tokens}, but must be at least 2.")
    if routes_attention(recipe.target):
        raise RefusedError(
            f"{recipe.target} has no dense layers, and as many experts as a key/value head has query heads: only k is free.",
            hint="Give another --target, or choose k with --top-k of `llamamoe split`.",
        )
    if recipe.align is not None:
        raise UsageError(
            "The recipe aligns all layers together, but budget measures one layer at a time.",
            hint="Choose layers with --set align=null, then split with the recipe that budget writes and --align-tokens.",
        )
    if not recipe.calibration:
        raise UsageError(
            "Sensitivity is measured on calibration text, and none is given.",
            hint="Give it with --calibration PATH; --calibration auto samples text from the source.",
        )


def _notes(target: Target) -> list[str]:
    if target.dense_layers != "none":
        return []
    return [f"{target.name} has no dense layers, so all layers are converted alike"]


def _alternative(found: DenseSet) -> dict[str, Any]:
    return {
        "layers": list(found.layers),
        "layer_share": found.sizes.share,
        "active_share": found.share,
        "damage": found.damage,
    }


def _by_layer(
    curves: Curves, chosen: DenseSet, uniform: Sizes, budget: float, size: int, pad_to: int
) -> dict[str, Any]:
    """Return the table of layers, and the simulated numbers of shared neurons."""
    alike, mixed = curves.at(uniform.share), curves.at(chosen.sizes.share)
    unit = -(-size // (_GRID * pad_to)) * pad_to
    fixed = uniform.share * size - uniform.shared
    found = share_out(curves, budget, size, fixed, unit, uniform.num_experts)
    layers = tuple(
        LayerBudget(
            layer=i,
            dense=i in chosen.layers,
            damage_uniform=float(alike[i]),
            damage=0.0 if i in chosen.layers else float(mixed[i]),
            simulated_shared=None if found is None else found[0][i],
        )
        for i in range(curves.num_layers)
    )
    simulated: dict[str, Any] = {"note": SIMULATED, "per_layer_shared": None, "damage": None}
    if found is not None:
        simulated |= {"per_layer_shared": list(found[0]), "damage": found[1]}
    return {"layers": layers, "simulated": simulated}


def _task(
    sizer: Sizer,
    target: Target,
    shares: Sequence[float],
    folder: Path,
    held_out_tokens: int,
    progress: ProgressCallback,
) -> Task:
    """Return the plans at the shares (without those that are too small), and the text."""
    from ...calibration.compute import choose_compute
    from ...conversion.texts import make_text

    plans: list[SplitPlan] = []
    costs: list[float] = []
    for share in shares:
        try:
            sizes = sizer.fit(target, share)
        except RefusedError:
            if share == shares[-1]:
                raise
            continue
        if not costs or sizes.share > costs[-1]:
            plans.append(sizer.plan(target, sizes))
            costs.append(sizes.share)
    compute = choose_compute(plans[0].recipe.device, plans[0].recipe.compute_dtype, plans[0].source_dtype)
    text = make_text(plans[0], compute, progress)
    return Task(tuple(plans), tuple(costs), text, compute, folder, held_out_tokens, progress)
