"""Complete the choices that a recipe leaves open, and find which methods need calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..architectures.targets import TARGETS
from ..errors import RefusedError
from ..methods.repairs import REPAIRS
from ..methods.routers import ROUTERS
from ..methods.selectors import SELECTORS
from ..methods.splitters import SPLITTERS
from ..methods.splitters.base import Splitter
from ..plugins import Plugin, Registry
from ..recipes import Choice
from .open_sizes import (
    SIZES,
    active_neurons,
    changed_sizes,
    fitting_shared,
    given_sizes,
    left_open,
    updated,
    with_active_share,
    with_preferred_sizes,
)
from .preference import Preference
from .recipe import AUTO, NO_REPAIR, SplitRecipe

CALIBRATED_DEFAULT: dict[str, Any] = {
    "method": "token_clusters",
    "shared_by": "power",
    "router": "ridge",
    "repair": "distill",
}
"""The meaning of ``method: auto`` with calibration text: values for keys that the recipe does not name."""
DEFAULT_PREFERENCE: Preference = "balanced"
"""The sizes of ``method: auto`` with calibration text: about half of the FFN active, at the speed of the fastest shapes."""
_MANY = 64
"""Calibration tokens for each active neuron from which a repair's own strength is as good as one chosen on held-out tokens."""
_FEW_TOKENS = {"distill": {"ridge": "auto"}, "least_squares": {"ridge": "auto", "penalty": "balanced"}}
"""Options of repairs that are better with few tokens (BENCHMARKS.md, "Calibrated conversion: little text")."""
UNCALIBRATED_DEFAULT = "cluster_shared"
"""The meaning of ``method: auto`` without calibration text."""
TEXT_NEEDS = ("activations", "gradients")


@dataclass(frozen=True)
class Chosen:
    """A recipe with every method named.

    Attributes:
        recipe: ``method``, ``shared_by``, ``router``, ``rescale`` and ``repair`` are set; sizes are as requested.
        splitter: The class of the method.
        needing: Plug-ins that need calibration text, such as ``router 'ridge'``.
        gradients: Whether one of them needs gradients.
        warnings: Choices that replace a better one.
        notes: Sizes that differ from those that were asked for or are the default, and why.
    """

    recipe: SplitRecipe
    splitter: type[Splitter]
    needing: tuple[str, ...]
    gradients: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """True if calibration text is read."""
        return bool(self.needing)


def complete(recipe: SplitRecipe, intermediate_size: int | None = None) -> Chosen:
    """Choose every method that the recipe leaves open.

    Args:
        recipe: The user's recipe.
        intermediate_size: F, for the default number of experts; None leaves it unchanged.

    Raises:
        RefusedError: A method needs calibration text and there is none, or a router is a control that cannot be stored.
    """
    warnings: list[str] = []
    notes: list[str] = []
    named = recipe.repair is not None
    if _takes_usual_sizes(recipe):
        recipe = recipe.model_copy(update={"prefer": DEFAULT_PREFERENCE})
    if recipe.prefer is not None and intermediate_size is not None:
        notes += changed_sizes(recipe, intermediate_size)
        recipe, warnings = with_preferred_sizes(recipe, intermediate_size)
    if recipe.method.name == AUTO:
        recipe, more = _auto(recipe)
        warnings += more
    splitter = SPLITTERS.get(recipe.method.name)
    if recipe.active is not None and intermediate_size is not None:
        recipe = with_active_share(recipe, splitter, intermediate_size)
    given = bool(recipe.calibration)
    repair: str | Choice = recipe.repair or splitter.default_repair or NO_REPAIR
    if recipe.repair is None and not (given and repair in REPAIRS):
        repair = NO_REPAIR
    recipe = updated(
        recipe,
        {
            "shared_by": recipe.shared_by or splitter.default_shared_by,
            "router": recipe.router or splitter.default_router,
            "rescale": recipe.rescale or splitter.default_rescale,
            "repair": repair,
        },
    )
    if intermediate_size is not None:
        recipe, more_notes = _little_text(recipe, splitter, intermediate_size, named=named)
        notes += more_notes
    plugins = list(_plugins(recipe, splitter))
    needing = tuple(text for text, plugin in plugins if plugin.needs in TEXT_NEEDS)
    needing += ("--align-tokens",) if recipe.align is not None else ()
    _refuse(recipe, needing)
    _refuse_alignment(recipe, splitter)
    if given and not needing:
        warnings.append("calibration text is given, but no chosen method needs it: it is not read")
    gradients = any(plugin.needs == "gradients" for _, plugin in plugins)
    return Chosen(recipe, splitter, needing, gradients, tuple(warnings), tuple(notes))


def _refuse(recipe: SplitRecipe, needing: tuple[str, ...]) -> None:
    assert recipe.router is not None
    if not ROUTERS.get(recipe.router.name).exportable:
        raise RefusedError(
            f"the router {recipe.router.name!r} is a control that cannot be stored: only `llamamoe compare` can "
            "simulate it.",
            hint=f"Choose one of {', '.join(r.name for r in ROUTERS if r.exportable)}.",
        )
    if needing and not recipe.calibration:
        raise RefusedError(
            f"calibration text is needed by {', '.join(needing)}, and none is given.",
            hint="Give it with --calibration PATH (txt, jsonl or parquet); --calibration auto samples text from the "
            f"source. Without text: --method {UNCALIBRATED_DEFAULT} --repair none.",
        )


def _refuse_alignment(recipe: SplitRecipe, cls: type[Splitter]) -> None:
    """Refuse to align methods that one label per neuron cannot represent, and to align nothing."""
    if recipe.align is None:
        return
    splitter = cls(cls.Options.model_validate(recipe.method.options))
    if splitter.overlap or (splitter.routed and splitter.parts(recipe.num_experts) != recipe.num_experts):
        raise RefusedError(
            f"--align-tokens learns one place for every neuron, but with --method {recipe.method.name} a neuron is in "
            "several experts.",
            hint="Use --method token_clusters.",
        )
    if recipe.router_scale == "soft":
        raise RefusedError(
            "--align-tokens learns with equal weights of experts; --router-scale soft weights them by their logits.",
            hint="Leave --router-scale at hard, or omit --align-tokens.",
        )
    if not recipe.align.learns(router=cls.routed):
        raise RefusedError(
            f"--align-tokens would learn nothing: the rates of assignment and router, and of the weights that align.weights = "
            f"{recipe.align.weights} trains, are all 0.",
            hint="Leave one of them at its default (align.lr_assignment, align.lr_router), or omit --align-tokens.",
        )


def _plugins(recipe: SplitRecipe, splitter: type[Splitter]) -> Iterator[tuple[str, type[Plugin]]]:
    """Yield the chosen plug-ins that process the layer, with their names for messages."""
    assert recipe.router is not None
    assert recipe.shared_by is not None
    assert recipe.repair is not None
    yield f"--method {recipe.method.name}", splitter
    wanted = splitter.default_shared if recipe.shared is None else recipe.shared
    chooses = splitter(splitter.Options.model_validate(recipe.method.options)).chooses_shared
    if wanted not in (0, "0x") and not chooses:
        yield f"--shared-by {recipe.shared_by.name}", SELECTORS.get(recipe.shared_by.name)
    yield f"--router {recipe.router.name}", ROUTERS.get(recipe.router.name)
    if recipe.repair.name != NO_REPAIR:
        yield f"--repair {recipe.repair.name}", REPAIRS.get(recipe.repair.name)


def _takes_usual_sizes(recipe: SplitRecipe) -> bool:
    """Return True if the recipe leaves method and sizes to the default for calibration text."""
    if recipe.method.name != AUTO or recipe.prefer is not None or not recipe.calibration:
        return False
    return given_sizes(recipe) != SIZES and CALIBRATED_DEFAULT["method"] in SPLITTERS


def _auto(recipe: SplitRecipe) -> tuple[SplitRecipe, list[str]]:
    """Return the recipe with a method in place of ``auto``, which sets the keys that the recipe does not name."""
    wanted: dict[str, Any] = {"method": UNCALIBRATED_DEFAULT}
    warnings = []
    if recipe.calibration and CALIBRATED_DEFAULT["method"] in SPLITTERS:
        wanted = {key: value for key, value in CALIBRATED_DEFAULT.items() if _known(key, value)}
    elif not recipe.calibration:
        warnings.append(
            f"no calibration text: the method is {UNCALIBRATED_DEFAULT}, which loses much more quality than one that uses "
            "text (--calibration PATH, or --calibration auto)"
        )
    values = left_open(recipe, wanted)
    if recipe.shared is None and recipe.target in TARGETS:
        values["shared"] = fitting_shared(recipe, values)
    return updated(recipe, values), warnings


def _little_text(
    recipe: SplitRecipe, splitter: type[Splitter], size: int, *, named: bool
) -> tuple[SplitRecipe, list[str]]:
    """Return the recipe with the repair's strength chosen on held-out tokens, if there are few, or a note that advises it."""
    repair = recipe.repair
    better = _FEW_TOKENS.get(repair.name) if repair is not None and recipe.calibration else None
    active = active_neurons(recipe, splitter, size)
    if repair is None or better is None or recipe.calibration_tokens >= _MANY * active:
        return recipe, []
    if repair.options.get("ridge") == "auto":
        return recipe, []
    few = f"{recipe.calibration_tokens:,} calibration tokens are few for {active:,} active neurons"
    if named:
        flags = " ".join(f"--set repair.{key}={value}" for key, value in better.items())
        return recipe, [f"{few}: choose the strength of the repair on held-out tokens ({flags})"]
    values = {"repair": {"name": repair.name, **repair.options, **better}}
    return updated(recipe, values), [
        f"{few}: the strength of the repair is chosen on held-out tokens (repair.ridge: auto)"
    ]


def _known(key: str, value: Any) -> bool:
    registries: dict[str, Registry[Any]] = {"shared_by": SELECTORS, "router": ROUTERS, "repair": REPAIRS}
    return key not in registries or value in registries[key]
