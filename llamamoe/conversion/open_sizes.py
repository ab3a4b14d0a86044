"""Choose the sizes that a recipe leaves open: by a preference, by the share of active neurons, or for a target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from ..architectures.targets import TARGETS
from ..errors import RefusedError
from ..methods.splitters import SPLITTERS
from ..methods.splitters.base import Splitter
from .preference import LEAST_WIDTH, preferred_shape, preferred_sizes
from .recipe import SplitRecipe, build_recipe

SIZES = frozenset(("num_experts", "top_k", "shared"))
"""The keys of a recipe that a preference sets."""


def given_sizes(recipe: SplitRecipe) -> set[str]:
    """Return the keys of `SIZES` that the recipe gives."""
    return {key for key in SIZES & recipe.model_fields_set if getattr(recipe, key) is not None}


def with_preferred_sizes(recipe: SplitRecipe, size: int) -> tuple[SplitRecipe, list[str]]:
    """Return the recipe with open sizes set according to ``prefer``, and warnings.

    The preference itself is dropped: the written recipe has sizes, which reproduce the result.

    Raises:
        RefusedError: The method makes no experts.
    """
    assert recipe.prefer is not None
    if recipe.method.name in SPLITTERS and not SPLITTERS.get(recipe.method.name).routed:
        raise RefusedError(
            f"--prefer chooses sizes of experts, and {recipe.method.name} makes none.",
            hint="Omit it, or use another --method.",
        )
    if given_sizes(recipe) == SIZES:
        text = (
            f"--prefer {recipe.prefer} has no effect: num_experts, top_k and shared are given (by a flag or the recipe)"
        )
        return recipe.model_copy(update={"prefer": None}), [text]
    wanted = preferred_sizes(recipe.prefer, size)
    values = left_open(recipe, wanted)
    if given_sizes(recipe):  # other sizes than those that divide well
        values.pop("pad_to", None)
    if recipe.shared is None and recipe.target in TARGETS and TARGETS.get(recipe.target).shared != "any":
        shared = values["shared"]
        values["shared"] = fitting_shared(
            recipe, values | {"shared": shared / size if isinstance(shared, int) else shared}
        )
    return updated(recipe, values).model_copy(update={"prefer": None}), []


def with_active_share(recipe: SplitRecipe, splitter: type[Splitter], size: int) -> SplitRecipe:
    """Return the recipe with the k at which a token uses about ``active`` of the neurons, in the place of ``active``.

    Raises:
        RefusedError: The method selects no experts, or the shared neurons alone are as many.
    """
    assert recipe.active is not None
    if not splitter.routed:
        raise RefusedError(
            f"--active chooses the number of selected experts, and {splitter.name} makes none.",
            hint=f"Its neurons are those of --shared, such as --shared {recipe.active:g}.",
        )
    shared = _shared_share(recipe, splitter, size)
    if recipe.active <= shared:
        raise RefusedError(
            f"--active {recipe.active:g} leaves nothing to select: {100 * shared:.3g} % of the neurons are shared.",
            hint=f"Give more, or share fewer (--shared {recipe.active / 2:.2g}).",
        )
    top_k = round((recipe.active - shared) / (1 - shared) * recipe.num_experts)
    return recipe.model_copy(update={"top_k": min(max(1, top_k), recipe.num_experts), "active": None})


def _shared_share(recipe: SplitRecipe, splitter: type[Splitter], size: int) -> float:
    """Return the shared neurons over all of the FFN's, approximately."""
    wanted = splitter.default_shared if recipe.shared is None else recipe.shared
    if isinstance(wanted, str):
        shares = int(wanted[:-1])
        return shares / (recipe.num_experts + shares)
    return wanted if isinstance(wanted, float) else wanted / size


def active_neurons(recipe: SplitRecipe, splitter: type[Splitter], size: int) -> int:
    """Return the neurons of the parent's FFN that one token uses, approximately."""
    shared = _shared_share(recipe, splitter, size)
    routed = (1 - shared) * recipe.top_k / recipe.num_experts if splitter.routed else 0
    return max(1, round(size * (shared + routed)))


def changed_sizes(recipe: SplitRecipe, size: int) -> Iterator[str]:
    """Yield a note if this FFN gets other sizes than ``prefer`` has in general, and no size is given."""
    assert recipe.prefer is not None
    if given_sizes(recipe) or recipe.active is not None:
        return
    experts, top_k, shared = preferred_shape(recipe.prefer)
    sizes = preferred_sizes(recipe.prefer, size)
    if (sizes["num_experts"], sizes["top_k"]) == (experts, top_k):
        return
    if "pad_to" in sizes:
        why = f"so that experts are a multiple of {sizes['pad_to']} neurons wide without padding"
    else:
        why = f"so that no expert is narrower than {LEAST_WIDTH} neurons"
    yield (
        f"the shape of --prefer {recipe.prefer} is {top_k} of {experts} experts, {100 * shared:.3g} % shared; the FFN of {size:,} neurons "
        f"gets {sizes['top_k']} of {sizes['num_experts']}, {why}"
    )


def left_open(recipe: SplitRecipe, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the values of ``wanted`` that the recipe leaves open; if only N or k is given, k / N is kept."""
    given = recipe.model_fields_set
    values = {k: v for k, v in wanted.items() if k == "method" or k not in given or getattr(recipe, k) is None}
    if {"num_experts", "top_k"} <= wanted.keys():
        share = wanted["top_k"] / wanted["num_experts"]
        if "num_experts" in given and "top_k" not in given:
            values["top_k"] = max(1, round(share * recipe.num_experts))
        elif "top_k" in given and "num_experts" not in given:
            values["num_experts"] = max(2, round(recipe.top_k / share))
    return values


def fitting_shared(recipe: SplitRecipe, values: dict[str, Any]) -> float | int | str:
    """Return the default share of neurons in the form that the named target supports."""
    method = values.get("method", recipe.method.name)
    share = cast(float, values["shared"] if "shared" in values else SPLITTERS.get(method).default_shared)
    form = TARGETS.get(recipe.target).shared
    if form == "none" or not share:
        return 0
    if form == "one":
        return "1x"
    experts = values.get("num_experts", recipe.num_experts)
    return f"{max(1, round(experts * share / (1 - share)))}x" if form == "multiple" else share


def updated(recipe: SplitRecipe, values: dict[str, Any]) -> SplitRecipe:
    """Return the recipe with some values changed, each validated as if it were in the file."""
    sizes = {"num_experts": recipe.num_experts, "top_k": recipe.top_k}
    checked = build_recipe(sizes | values)
    return recipe.model_copy(update={key: getattr(checked, key) for key in values})
