"""Choose the sizes of a conversion: widths, shared neurons, dense layers, and a target that supports them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..architectures.moe_layout import Combine, MoeLayout
from ..architectures.rescales import RESCALES
from ..architectures.sources.base import DenseSpec
from ..architectures.targets import TARGETS
from ..architectures.targets.base import Target
from ..architectures.targets.engines import ENGINES, engine_refusals
from ..errors import RefusedError
from ..methods.splitters import SPLITTERS
from ..methods.splitters.base import Splitter
from ..numerics import is_power_of_two
from .recipe import SplitRecipe

_ORDER = {
    False: ("mixtral", "qwen3_moe", "qwen2_moe", "granitemoeshared", "glm4_moe", "ernie4_5_moe"),
    True: ("qwen2_moe", "glm4_moe", "granitemoeshared", "ernie4_5_moe"),
}
"""Targets that ``auto`` tries, without and with shared neurons; others (plug-ins) follow, by name."""

QUANTISED_BLOCK = 32
"""Rows of a multiple of this length can be quantised (llama.cpp's 8-bit and older 4-bit types, mlx)."""
PAD_TO = 8
"""Multiple of expert widths if `QUANTISED_BLOCK` would cost too much."""
MOST_PADDING = 0.03
"""Share of the FFN from which padding costs too much."""

GATED_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def _pad_to(recipe: SplitRecipe) -> int:
    return recipe.pad_to or PAD_TO


def _expert_width(routed: int, parts: int, recipe: SplitRecipe) -> int:
    return round_up(-(-routed // parts), _pad_to(recipe))


def _widths_shared(multiple: int, size: int, parts: int, recipe: SplitRecipe) -> int:
    """Return S for ``m`` expert widths: m W, with W the padded width when the FFN is split into ``parts`` + m."""
    return multiple * round_up(-(-size // (parts + multiple)), _pad_to(recipe))


def _multiples(size: int, parts: int, recipe: SplitRecipe) -> dict[int, int]:
    """Return every ``m`` for which m expert widths can be shared, and its S."""
    found = {m: _widths_shared(m, size, parts, recipe) for m in range(1, 4 * parts)}
    return {m: shared for m, shared in found.items() if parts <= size - shared}


def _shared_neurons(spec: DenseSpec, recipe: SplitRecipe, splitter: Splitter) -> int:
    wanted = splitter.default_shared if recipe.shared is None else recipe.shared
    size, parts = spec.intermediate_size, splitter.parts(recipe.num_experts)
    if isinstance(wanted, str):
        if not parts:
            raise RefusedError(
                f"shared = {wanted!r} counts expert widths, but {splitter.name} has no experts.",
                hint="Give the neurons to keep as a share (0.5) or a count.",
            )
        return _widths_shared(int(wanted[:-1]), size, parts, recipe)
    return round(wanted * size) if isinstance(wanted, float) else wanted


def with_only_experts(spec: DenseSpec, recipe: SplitRecipe) -> SplitRecipe:
    """Return the recipe with the only N that its target can hold of this source, and half of it as k, if N is not given."""
    only = TARGETS.get(recipe.target)().only_experts(spec) if recipe.target in TARGETS else None
    given = recipe.model_fields_set
    if only is None or only < 2 or "num_experts" in given or recipe.prefer is not None:
        return recipe
    sizes = {"num_experts": only} | ({} if "top_k" in given else {"top_k": (only + 1) // 2})
    return recipe.model_copy(update=sizes)


def make_splitter(recipe: SplitRecipe) -> Splitter:
    """Return the recipe's method with its options."""
    method = SPLITTERS.get(recipe.method.name)
    return method(method.Options.model_validate(recipe.method.options))


def padded(spec: DenseSpec, recipe: SplitRecipe, method: type[Splitter], dtype: str) -> SplitRecipe:
    """Return the recipe with ``pad_to`` set: as requested, or the largest supported one that costs little."""
    splitter = method(method.Options.model_validate(recipe.method.options))
    if recipe.pad_to is not None:
        return recipe
    wide = recipe.model_copy(update={"pad_to": QUANTISED_BLOCK})
    if _padding_share(spec, wide, splitter) < MOST_PADDING:
        try:
            choose_target(spec, wide, method, dtype)
        except RefusedError:  # the shared neurons fit narrower experts only, or 8 is refused for the same reason
            pass
        else:
            return wide
    return recipe.model_copy(update={"pad_to": PAD_TO})


def _padding_share(spec: DenseSpec, recipe: SplitRecipe, splitter: Splitter) -> float:
    """Return zero neurons divided by the neurons of a layer, with copies counted once."""
    size, parts = spec.intermediate_size, splitter.parts(recipe.num_experts)
    shared = _shared_neurons(spec, recipe, splitter)
    if not parts or shared >= size:
        return 1.0
    return (parts * _expert_width(size - shared, parts, recipe) + round_up(shared, _pad_to(recipe))) / size - 1


def choose_target(spec: DenseSpec, recipe: SplitRecipe, method: type[Splitter], dtype: str) -> tuple[Target, MoeLayout]:
    """Return the named target, or for ``auto`` the first that fits (preferring both majors of transformers).

    Raises:
        RefusedError: No target fits; the message names every reason.
    """
    splitter = method(method.Options.model_validate(recipe.method.options))
    shared = _shared_neurons(spec, recipe, splitter)
    _check_sizes(spec, recipe, splitter, shared)
    dense_layers = _dense_layers(spec, recipe)
    fitting, reasons = [], []
    for name in candidate_targets(recipe, splitter, shared):
        target = TARGETS.get(name)().inside(spec.whole)
        layout = _layout(spec, recipe, splitter, target, shared, dense_layers)
        found = _refusals(spec, recipe, target, layout, dtype)
        reasons += found
        if not found:
            fitting.append((target, layout))
    if not fitting:
        which = "no target can" if recipe.target == "auto" else f"the target {recipe.target} cannot"
        raise RefusedError(
            f"{which} hold this conversion exactly:\n" + "\n".join(f"  - {r}" for r in dict.fromkeys(reasons)),
            hint="`llamamoe methods --matrix` shows which targets support which family.",
        )
    return next((f for f in fitting if len(f[0].majors(spec)) > 1), fitting[0])


def only_target(spec: DenseSpec, recipe: SplitRecipe) -> SplitRecipe:
    """Return the recipe with the target named if a single one with experts computes the source, so that sizes suit it."""
    method = recipe.method.name
    if recipe.target != "auto" or (method in SPLITTERS and not SPLITTERS.get(method).routed):
        return recipe
    tried = [target for target in TARGETS if target.routed and not target.attention_experts]
    holding = [target.name for target in tried if not target().refusals(spec)]
    return recipe.model_copy(update={"target": holding[0]}) if len(holding) == 1 else recipe


def candidate_targets(recipe: SplitRecipe, splitter: Splitter, shared: int) -> list[str]:
    """Return the names of the targets to try, the preferred first."""
    if recipe.target != "auto":
        return [recipe.target]
    # attention becomes sparse only on request
    kinds = [target for target in TARGETS if target.routed == splitter.routed and not target.attention_experts]
    names = [target.name for target in kinds]
    first = [name for name in _ORDER[shared > 0] if name in names]
    return first + [name for name in names if name not in _ORDER[True] + _ORDER[False]]


def _check_sizes(spec: DenseSpec, recipe: SplitRecipe, splitter: Splitter, shared: int) -> None:
    size, parts = spec.intermediate_size, splitter.parts(recipe.num_experts)
    if shared >= size:
        left = "to route" if splitter.routed else "to leave out"
        raise RefusedError(
            f"shared = {recipe.shared!r} means {shared} neurons, but the FFN has only {size}: nothing is left {left}."
        )
    if not splitter.routed and shared == 0:
        raise RefusedError(
            f"{splitter.name} keeps the shared neurons only, and there are none.", hint="For example --shared 0.5."
        )
    if parts > size - shared:
        raise RefusedError(f"num_experts = {parts} is more than the {size - shared} neurons that are to be routed.")
    refusals = splitter.refusals(recipe.num_experts, recipe.top_k, recipe.router_scale) if splitter.routed else []
    if refusals:
        raise RefusedError(f"{splitter.name}: {'; '.join(refusals)}.")
    if spec.hidden_act not in GATED_ACTIVATIONS:
        raise RefusedError(
            f"hidden_act {spec.hidden_act!r} is not a supported activation of a gated FFN: {', '.join(GATED_ACTIVATIONS)}."
        )


def _dense_layers(spec: DenseSpec, recipe: SplitRecipe) -> tuple[int, ...]:
    count_ = spec.num_layers
    wrong = [layer for layer in recipe.keep_dense if not -count_ <= layer < count_]
    if wrong:
        raise RefusedError(f"--keep-dense names layer {wrong[0]}, but the model has layers 0 to {count_ - 1}.")
    layers = tuple(sorted({layer % count_ for layer in recipe.keep_dense}))
    if len(layers) == count_:
        raise RefusedError("--keep-dense names every layer: nothing would be split.")
    return layers


def _layout(
    spec: DenseSpec,
    recipe: SplitRecipe,
    splitter: Splitter,
    target: Target,
    shared: int,
    dense_layers: tuple[int, ...],
) -> MoeLayout:
    if not splitter.routed:
        return MoeLayout(0, 0, 0, shared, shared, dense_layers, Combine("renormalised", 1.0, 1.0, True, 1.0), 0)
    parts = splitter.parts(recipe.num_experts)
    width = _expert_width(spec.intermediate_size - shared, parts, recipe)
    stored = round_up(shared, _pad_to(recipe)) if shared else target.stub_width(width)
    if shared and target.shared in ("multiple", "one"):
        # S as m expert widths: every "mx" fits, however rounding leaves the routed neurons.
        sizes = _multiples(spec.intermediate_size, parts, recipe)
        width = min((s // m for m, s in sizes.items() if s == shared and s // m >= width), default=width)
        stored = shared
    rescale = RESCALES.get(recipe.rescale.name if recipe.rescale else splitter.default_rescale)()
    copies = recipe.num_experts // parts
    combine = target.combine(rescale, recipe.num_experts, recipe.top_k, copies)
    combine = replace(combine, bake=combine.bake * target.residual_scale(spec))
    return MoeLayout(recipe.num_experts, recipe.top_k, width, shared, stored, dense_layers, combine, copies)


def _refusals(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout, dtype: str) -> list[str]:
    reasons = [*target.refusals(spec), *target.layout_refusals(spec, layout)]
    reasons += _shared_refusals(spec, recipe, target, layout)
    reasons += _attention_refusals(spec, recipe, target, layout)
    if layout.copies > 1 and layout.combine.parity_factor != 1.0:
        reasons.append("copies of the FFN are averaged: only --rescale mean reproduces its output")
    dense = target.dense_layer_refusal(layout.dense_layers, spec.num_layers)
    if dense:
        reasons.append(dense)
    reasons += _requirement_refusals(spec, recipe, target, layout)
    return [*reasons, *_rounding_refusals(spec, target, dtype)]


def _shared_refusals(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout) -> Iterator[str]:
    if target.routed != bool(layout.num_experts):
        holds = "experts, which this method does not make" if target.routed else "no experts"
        yield f"{target.name} holds {holds} (--target auto)"
    elif layout.num_shared and target.shared == "none":
        yield (
            f"{target.name} has no shared expert, but {layout.num_shared} neurons are to be shared (--shared 0, or another --target)"
        )
    elif layout.num_shared and target.shared == "multiple" and layout.num_shared % layout.expert_width:
        yield _nearest_shared(spec, recipe, target, layout)
    elif layout.num_shared and target.shared == "one" and layout.num_shared != layout.expert_width:
        yield (
            f"{target.name} has one shared expert, as wide as a routed one ({layout.expert_width}), not of {layout.num_shared} neurons: "
            "use --shared 1x"
        )


def _attention_refusals(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout) -> Iterator[str]:
    only = target.only_experts(spec)
    if only is not None and layout.num_experts != only > 1:
        yield (
            f"{target.name} routes the query heads of each key/value head with the experts of the FFN, and there are {only} "
            f"(--experts {only}, not {layout.num_experts})"
        )
    if only is not None and recipe.align is not None:
        yield f"{target.name} routes attention, and --align-tokens learns FFNs only"
    if only is not None and layout.copies > 1:
        yield f"{target.name} routes query heads, which {recipe.method.name} does not copy as it copies FFNs"


def _requirement_refusals(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout) -> Iterator[str]:
    if recipe.require is not None and recipe.require in ENGINES:
        found = engine_refusals(recipe.require, target.name, spec, layout)
        yield from (f"--require {recipe.require}: {reason}" for reason in found)
    elif recipe.require and recipe.require not in target.majors(spec):
        why = f" for this source ({', '.join(sorted(target.needs_five))})" if target.needs_five else ""
        yield f"--require {recipe.require}: {target.name} needs transformers 5{why}"


def _rounding_refusals(spec: DenseSpec, target: Target, dtype: str) -> Iterator[str]:
    if dtype == "F32":
        return
    if spec.norm_offset:
        yield f"{spec.family}'s norm weights become 1 + w, which {dtype} would round: use --dtype float32"
    fold = target.fold(spec)
    if not is_power_of_two(fold):
        yield (
            f"{target.name} {target.fold_reason(spec)} and {dtype} would round embeddings times {fold:g}: use --dtype float32"
        )


def _nearest_shared(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout) -> str:
    wanted = layout.num_shared
    parts = layout.num_experts // layout.copies
    sizes = {s: m for m, s in reversed(_multiples(spec.intermediate_size, parts, recipe).items())}
    near = sorted(sizes, key=lambda s: abs(s - wanted))[:2]
    ways = " or ".join(f"--shared {sizes[s]}x ({s} neurons)" for s in sorted(near)) or "fewer experts"
    return f"{target.name}'s shared expert is a multiple of the expert width ({layout.expert_width}), which {wanted} is not: use {ways}"
