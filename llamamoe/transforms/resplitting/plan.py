"""Sizes of the result of ``llamamoe resplit``, its configuration, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...architectures.expert_weighting import complete_config, equal_pieces, rescaled_block
from ...architectures.moe_checkpoint import ConvertedModel
from ...architectures.moe_layout import MoeLayout, weight
from ...architectures.rescales import RESCALES
from ...conversion.calibration_cost import CalibrationPlan, plan_calibration
from ...conversion.defaults import Chosen
from ...conversion.preference import LEAST_WIDTH
from ...conversion.recipe import NO_REPAIR, build_recipe
from ...conversion.sizes import PAD_TO
from ...errors import RefusedError, UsageError
from ...methods.splitters import SPLITTERS
from ...numerics import is_power_of_two
from ...words import plural
from ..finer_experts import piece_width
from ..mixing.exactness import mix_exactness, rest_of
from .recipe import ResplitRecipe, usable_methods


@dataclass(frozen=True)
class ResplitResult:
    """The result of `resplit`, or its plan.

    Attributes:
        out: The output folder; None for a plan.
        num_experts: N before and after.
        top_k: k before and after.
        expert_width: Neurons of one expert before and after, padding included.
        padding: Zero neurons that are added to each expert of the source.
        factor: Factor of the routed outputs that makes up for smaller router weights.
        where: Place of that factor: ``"config"``, ``"weights"`` or, if it is 1, ``"nowhere"``.
        exact: Whether it does not round.
        nbytes: Bytes of all tensors.
        receipt: The content of ``llamamoe_derived.json``; empty for a plan.
        warnings: Sentences for the user.
        calibration: The cost of calibration; None without it, when the function stays the same.
    """

    out: Path | None
    num_experts: tuple[int, int]
    top_k: tuple[int, int]
    expert_width: tuple[int, int]
    padding: int
    factor: float
    where: str
    exact: bool
    nbytes: int
    receipt: dict[str, Any]
    warnings: tuple[str, ...]
    calibration: CalibrationPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        out = None if self.out is None else str(self.out)
        cost: dict[str, Any] = {}
        if self.calibration is not None:
            cost = {"calibration_cost": self.calibration.to_json(), "peak_memory_bytes": self.calibration.peak_bytes}
        return {"out": out, "bytes": self.nbytes, **cost, **self.facts, **self.receipt}

    @property
    def baked(self) -> float:
        """Factor of the routed down projections."""
        return self.factor if self.where == "weights" else 1.0

    @property
    def active_neurons(self) -> tuple[int, int]:
        """Neurons of routed experts that a token uses in one layer, before and after, padding included."""
        before, after = (k * width for k, width in zip(self.top_k, self.expert_width, strict=True))
        return before, after

    @property
    def facts(self) -> dict[str, Any]:
        """The sizes, as they are recorded."""
        names = ("num_experts", "top_k", "expert_width", "padding", "factor", "where", "exact")
        return {name: getattr(self, name) for name in names}


def check_recipe(source: ConvertedModel, recipe: ResplitRecipe) -> None:
    """Refuse a recipe that does not suit the mixture, and a router that does not.

    Raises:
        UsageError: A number or the method is invalid, or text is missing or has no use.
        RefusedError: The router selects groups of experts, or attention is routed, too.
    """
    if source.target.attention_experts:
        raise RefusedError(
            f"{source.target.name} routes attention with the same number of experts, {source.layout.num_experts}, and its query heads cannot be "
            "split: its FFNs cannot have more experts alone.",
            hint="Split the dense model with another --target and more --experts; `llamamoe densify` makes one of this model.",
        )
    width, method, text = source.layout.expert_width, recipe.chosen, bool(recipe.calibration)
    if not 2 <= recipe.pieces <= width:
        raise UsageError(f"{recipe.pieces} pieces, but it must be from 2 to {width}, the width of an expert.")
    known = usable_methods(text=text)
    if method.name not in known:
        if method.name in usable_methods(text=True):
            raise UsageError(
                f"the method {method.name!r} needs text.",
                hint=f"Give --calibration, and --top-k below {source.layout.top_k * recipe.pieces}. Without text: {', '.join(known)}.",
            )
        which = "With text" if text else "Without text"
        raise UsageError(f"the method {method.name!r} cannot split experts.", hint=f"{which}: {', '.join(known)}.")
    groups = source.checkpoint.config.get("n_group")
    if groups not in (None, 1):
        raise RefusedError(
            f"its router selects among {groups} groups of experts by their two best (n_group): repeated rows would change "
            "which groups win.",
            hint="llamamoe supports n_group = 1.",
        )
    _check_top_k(source.layout.top_k * recipe.pieces, recipe)


def _check_top_k(whole: int, recipe: ResplitRecipe) -> None:
    """Refuse a number of selected pieces that text, or its absence, does not allow; ``whole`` selects all of k experts."""
    top_k = whole if recipe.top_k is None else recipe.top_k
    if top_k > whole:
        raise UsageError(
            f"top_k is {top_k}, but must be at most {whole}: all pieces of the experts that MODEL selects.",
            hint="To select more experts, use `llamamoe retop` on MODEL first.",
        )
    if top_k < whole and not recipe.calibration:
        raise UsageError(
            f"top_k is {top_k}, less than the {whole} pieces that compute the function of MODEL: which pieces a token needs is learned "
            "from text.",
            hint="Give text with --calibration, or omit --top-k.",
        )
    if top_k == whole and recipe.calibration:
        raise UsageError(
            f"text has no use where all {whole} pieces of the selected experts run: the function is that of MODEL.",
            hint=f"Give a smaller --top-k, such as {max(1, whole // 2)}, or omit --calibration.",
        )


def _finer(source: ConvertedModel, recipe: ResplitRecipe) -> MoeLayout:
    """Return the sizes of the result.

    Raises:
        RefusedError: The shared expert's width would not be a multiple of the experts'.
    """
    old, pieces = source.layout, recipe.pieces
    width = piece_width(old.expert_width, pieces)
    if source.target.shared == "one":
        raise RefusedError(
            f"{source.target.name} stores one shared expert, as wide as a routed one: experts cannot become narrower than it."
        )
    if source.target.shared == "multiple" and old.shared_width % width:
        raise RefusedError(
            f"{source.target.name} stores shared neurons in units of an expert's width, and {old.shared_width} is not a multiple of "
            f"{width} = {old.expert_width} / {pieces}, rounded up to a multiple of {PAD_TO}.",
            hint=_fitting_pieces(old),
        )
    return replace(
        old, num_experts=old.num_experts * pieces, top_k=recipe.top_k or old.top_k * pieces, expert_width=width
    )


def _fitting_pieces(old: MoeLayout) -> str:
    """Return the hint that names the numbers of pieces whose width divides the shared expert's."""
    widths = {pieces: piece_width(old.expert_width, pieces) for pieces in range(2, old.expert_width + 1)}
    narrower = {pieces: width for pieces, width in widths.items() if width < old.expert_width}
    fitting = [str(pieces) for pieces, width in narrower.items() if old.shared_width % width == 0]
    return f"Numbers of pieces that fit: {', '.join(fitting[:6]) or 'none'}."


def planned(
    source: ConvertedModel, recipe: ResplitRecipe, text_tokens: int | None = None
) -> tuple[MoeLayout, ResplitResult]:
    """Return the sizes of the result in the form that targets take, and in the form of the plan.

    Args:
        source: The mixture.
        recipe: The recipe.
        text_tokens: Maximum number of tokens that the text has; None if it is not known.

    Raises:
        RefusedError: The target cannot hold them, or sequences would be longer than the model has positions.
    """
    old, layout, mixing = source.layout, _finer(source, recipe), source.mixing
    ratio = weight(mixing.weighting, old.num_experts, old.top_k) / weight(
        mixing.weighting, layout.num_experts, layout.top_k
    )
    factor = 1.0 if abs(ratio - 1) < 1e-12 else round(ratio, 12)
    where = "nowhere" if factor == 1 else "config" if source.target.scaling_knob else "weights"
    if where == "config":
        layout = replace(layout, combine=replace(layout.combine, factor=mixing.factor * factor))
    calibration = _calibration(source, layout, recipe, text_tokens) if recipe.calibration else None
    exact = calibration is None and (where != "weights" or is_power_of_two(factor))
    padding = recipe.pieces * layout.expert_width - old.expert_width
    plan = ResplitResult(
        out=None,
        num_experts=(old.num_experts, layout.num_experts),
        top_k=(old.top_k, layout.top_k),
        expert_width=(old.expert_width, layout.expert_width),
        padding=padding,
        factor=factor,
        where=where,
        exact=exact,
        nbytes=0,
        receipt={},
        warnings=tuple(_warnings(source, layout, exact or calibration is not None, padding)),
        calibration=calibration,
    )
    return layout, plan


def _calibration(
    source: ConvertedModel, layout: MoeLayout, recipe: ResplitRecipe, text_tokens: int | None
) -> CalibrationPlan:
    """Return the cost of calibration: that of splitting a dense FFN of all neurons of the experts."""
    given = recipe.model_dump(include={"calibration", "calibration_tokens", "calibration_length", "repair"})
    same = build_recipe({**given, "num_experts": layout.num_experts, "top_k": layout.top_k, "method": recipe.chosen})
    spec = replace(source.spec, intermediate_size=source.layout.num_experts * source.layout.expert_width)
    splitter = SPLITTERS.get(recipe.chosen.name)
    chosen = Chosen(same, splitter, needing=("router 'ridge'",), gradients=False, warnings=())
    return plan_calibration(spec, chosen, replace(layout, num_shared=0), text_tokens)


def changed_config(
    source: ConvertedModel, recipe: ResplitRecipe, layout: MoeLayout, plan: ResplitResult
) -> dict[str, Any]:
    """Return the configuration of the result: the source's, with the keys that the sizes decide."""
    config, target = source.checkpoint.config, source.target
    before, after = (target.config(source.spec, each) for each in (source.layout, layout))
    known = complete_config(config).keys() | config.keys()
    changed = {key: value for key, value in after.items() if value != before.get(key) and key in known}
    block = source.block
    if not block:
        return {**config, **changed}
    if plan.calibration is not None:
        block |= {
            "parity": "none",
            "exactness": f"not exact: {layout.top_k} of {layout.num_experts} pieces are selected",
        }
        block |= {"repair": None if recipe.repair.name == NO_REPAIR else recipe.repair.name}
    elif "exactness" in block:
        block |= {"exactness": _exactness(block, recipe.pieces, rounded=not plan.exact)}
    sizes = {"num_experts": layout.num_experts, "top_k": layout.top_k, "expert_width": layout.expert_width}
    ratio = {} if plan.where == "nowhere" else {plan.where: plan.factor}
    block = rescaled_block(block, **ratio) | {key: value for key, value in sizes.items() if key in block}
    if not _same_rescale(source, layout):
        block["rescale"] = None
    return {**config, **changed, "llamamoe": block}


def _exactness(block: dict[str, Any], pieces: int, *, rounded: bool) -> str:
    """Return what the source's record says of exactness, in terms of the pieces."""
    told, before = str(block["exactness"]), equal_pieces({"llamamoe": block})
    for made in block.get("mix") or []:
        rest = rest_of(made["recipe"]["backbone"])
        told = told.replace(mix_exactness(rest, before), mix_exactness(rest, before * pieces))
    return f"{told}; down projections were rounded once more when experts were split" if rounded else told


def _same_rescale(source: ConvertedModel, layout: MoeLayout) -> bool:
    """Return whether the rescale's formula gives the pieces the coefficient that they have."""
    name = source.block.get("rescale")
    if name is None:
        return True
    coefficient, old = RESCALES.get(name)().coefficient, source.layout
    return math.isclose(coefficient(layout.num_experts, layout.top_k), coefficient(old.num_experts, old.top_k))


def _warnings(source: ConvertedModel, layout: MoeLayout, exact: bool, padding: int) -> list[str]:
    found = []
    if not exact:
        found.append(
            "the experts' down projections are rounded once to their dtype: the number of pieces is not a power of two"
        )
    if padding:
        found.append(
            f"each expert of MODEL gets {plural(padding, 'zero neuron')}, so that the width of its pieces is a multiple of {PAD_TO}, as "
            "transformers' products of experts need: they change nothing, and are counted in the costs"
        )
    if layout.expert_width >= source.layout.expert_width:
        found.append("so many zero neurons make a piece as wide as an expert of MODEL: take fewer pieces")
    if layout.expert_width < LEAST_WIDTH:
        found.append(
            f"experts of {layout.expert_width} neurons are narrow: programs compute them slowly, and formats with blocks of 32 numbers "
            "cannot quantise them"
        )
    if not _same_rescale(source, layout):
        found.append(
            f"the rescale {source.block['rescale']} depends on the number of experts, so it is no longer recorded: `retop` "
            "will leave the router's weights unchanged"
        )
    return found
