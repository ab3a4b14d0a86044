"""The plan of a conversion: sizes, names, shards, costs, warnings, refusals; from headers and a recipe alone.

The plan is pure: it reads no tensor and writes nothing. ``--dry-run`` prints it, the conversion executes it, the
model card quotes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._version import __version__
from .checkpoint.base import DTYPE_BYTES
from .costs import Cost, count
from .dense import DenseModel
from .errors import RefusedError
from .recipe import DTYPES, SplitRecipe
from .rescales import RESCALES
from .sources.base import DenseSpec, canonical_shapes
from .splitters import SPLITTERS
from .splitters.base import Splitter
from .targets import TARGETS
from .targets.base import MoeLayout, OutTensor, Target, common_config, is_power_of_two

_ORDER = {
    False: ("mixtral", "qwen3_moe", "qwen2_moe", "granitemoeshared", "glm4_moe", "ernie4_5_moe"),
    True: ("qwen2_moe", "glm4_moe", "granitemoeshared", "ernie4_5_moe"),
}
"""Targets that ``auto`` tries, without and with shared neurons; others (plug-ins) come after, by name."""

GATED_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

Shards = dict[str, dict[str, tuple[str, tuple[int, ...], int]]]
"""file name -> tensor name -> (dtype, shape, bytes), in file order."""


@dataclass(frozen=True)
class SplitPlan:
    """Everything that `llamamoe.split` will do.

    Attributes:
        model: The dense checkpoint, opened.
        recipe: The recipe with every choice made.
        target: The architecture to write.
        layout: Sizes and scales.
        dtype: Dtype of the weights, a safetensors name.
        tensors: Every tensor of the output in the order of a forward pass.
        shards: Where each of them goes.
        config: The output's ``config.json`` without provenance.
        parent_cost: What the dense model costs.
        cost: What the output costs.
        peak_bytes: Estimate of the anonymous memory that the conversion needs at most.
        warnings: What ``strict`` refuses.
        advice: What is good to know, about other runtimes and widths.
        parity: Whether all experts together compute what the parent computes.
        majors: Versions of transformers that load the output.
    """

    model: DenseModel
    recipe: SplitRecipe
    target: Target
    layout: MoeLayout
    dtype: str
    tensors: tuple[OutTensor, ...]
    shards: Shards
    config: dict[str, Any]
    parent_cost: Cost
    cost: Cost
    peak_bytes: int
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    parity: str
    majors: tuple[str, ...]

    @property
    def padding_per_layer(self) -> int:
        """Zero neurons added to the routed experts of one layer."""
        routed = self.model.spec.intermediate_size - self.layout.num_shared
        return self.layout.num_experts * self.layout.expert_width - routed

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, the same for every run."""
        layout = self.layout
        return {
            "llamamoe": __version__,
            "source": str(self.model.checkpoint.path),
            "family": self.model.source.name,
            "target": self.target.name,
            "transformers": list(self.majors),
            "method": self.recipe.method.name,
            "parity": self.parity,
            "num_experts": layout.num_experts,
            "top_k": layout.top_k,
            "expert_width": layout.expert_width,
            "padding_per_layer": self.padding_per_layer,
            "shared_neurons": layout.num_shared,
            "shared_width": layout.shared_width,
            "dense_layers": list(layout.dense_layers),
            "weighting": layout.combine.weighting,
            "factor": layout.combine.factor,
            "factor_in": "config" if layout.combine.bake == 1.0 and layout.combine.factor != 1.0 else "down_proj",
            "dtype": self.dtype,
            "parent": self.parent_cost.to_json(),
            "converted": self.cost.to_json(),
            "shards": {file: sum(n for _, _, n in tensors.values()) for file, tensors in self.shards.items()},
            "num_tensors": len(self.tensors),
            "peak_memory_bytes": self.peak_bytes,
            "warnings": list(self.warnings),
            "advice": list(self.advice),
            "recipe": self.recipe.model_dump(mode="json"),
        }


def plan_split(model: DenseModel, recipe: SplitRecipe) -> SplitPlan:
    """Decide everything. O(number of tensors), reads headers only.

    Raises:
        RefusedError: The conversion would be inexact, impossible or unsafe; every reason is named.
    """
    spec = model.spec
    splitter = SPLITTERS.get(recipe.method.name)
    dtype = DTYPES[recipe.dtype] if recipe.dtype else _source_dtype(model)
    target, layout = _choose_target(spec, recipe, splitter, dtype)
    recipe = recipe.model_copy(update=_resolved(recipe, splitter, target, layout, dtype))
    tensors = tuple(target.tensors(spec, layout))
    shards = _shards(tensors, dtype, recipe.shard_size)
    config = common_config(spec, target, next(n for n, d in DTYPES.items() if d == dtype)) | target.config(spec, layout)
    warnings = _warnings(model, recipe, layout, dtype)
    if recipe.strict and warnings:
        raise RefusedError("--strict refuses: " + "; ".join(warnings) + ".")
    return SplitPlan(
        model=model,
        recipe=recipe,
        target=target,
        layout=layout,
        dtype=dtype,
        tensors=tensors,
        shards=shards,
        config=config,
        parent_cost=_parent_cost(model),
        cost=count(
            ((t.role, t.shape, math.prod(t.shape) * DTYPE_BYTES[t.dtype or dtype]) for t in tensors),
            active_share=layout.top_k / layout.num_experts,
            tied=target.ties(spec),
        ),
        peak_bytes=_peak_bytes(spec, splitter, dtype),
        warnings=tuple(warnings),
        advice=tuple(_advice(spec, splitter, target, layout)),
        parity=splitter.parity,
        majors=target.majors(spec),
    )


# ---- sizes ------------------------------------------------------------------------------------------------------


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _expert_width(routed: int, recipe: SplitRecipe) -> int:
    return _round_up(-(-routed // recipe.num_experts), recipe.pad_to)


def _widths_shared(multiple: int, size: int, recipe: SplitRecipe) -> int:
    """S for ``m`` expert widths: m W, with W the padded width when the FFN is cut into N + m parts."""
    return multiple * _round_up(-(-size // (recipe.num_experts + multiple)), recipe.pad_to)


def _shared_neurons(spec: DenseSpec, recipe: SplitRecipe, splitter: type[Splitter]) -> int:
    wanted = splitter.default_shared if recipe.shared is None else recipe.shared
    size = spec.intermediate_size
    if isinstance(wanted, str):
        return _widths_shared(int(wanted[:-1]), size, recipe)
    return round(wanted * size) if isinstance(wanted, float) else wanted


def _choose_target(
    spec: DenseSpec, recipe: SplitRecipe, splitter: type[Splitter], dtype: str
) -> tuple[Target, MoeLayout]:
    """The named target, or for ``auto`` the first that fits (both majors of transformers before one)."""
    shared = _shared_neurons(spec, recipe, splitter)
    _check_sizes(spec, recipe, shared)
    dense_layers = _dense_layers(spec, recipe)
    if recipe.target == "auto":
        first = _ORDER[shared > 0]
        names = [n for n in first if n in TARGETS] + [
            n for n in TARGETS.names() if n not in _ORDER[True] + _ORDER[False]
        ]
    else:
        names = [recipe.target]
    fitting, reasons = [], []
    for name in names:
        target = TARGETS.get(name)()
        layout = _layout(spec, recipe, splitter, target, shared, dense_layers)
        found = _refusals(spec, recipe, target, layout, dtype)
        reasons += found
        if not found:
            fitting.append((target, layout))
    if not fitting:
        raise RefusedError(
            "no target can hold this conversion exactly:\n" + "\n".join(f"  - {r}" for r in dict.fromkeys(reasons)),
            hint="`llamamoe methods --matrix` shows which family goes to which target.",
        )
    return next((f for f in fitting if len(f[0].majors(spec)) > 1), fitting[0])


def _check_sizes(spec: DenseSpec, recipe: SplitRecipe, shared: int) -> None:
    size, experts = spec.intermediate_size, recipe.num_experts
    if shared >= size:
        raise RefusedError(
            f"shared = {recipe.shared!r} means {shared} neurons, but the FFN has only {size}: nothing is left to route."
        )
    if experts > size - shared:
        raise RefusedError(f"num_experts = {experts} is more than the {size - shared} neurons that are to be routed.")
    if spec.hidden_act not in GATED_ACTIVATIONS:
        raise RefusedError(
            f"hidden_act {spec.hidden_act!r} is none that a gated FFN is known to use: {', '.join(GATED_ACTIVATIONS)}."
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
    splitter: type[Splitter],
    target: Target,
    shared: int,
    dense_layers: tuple[int, ...],
) -> MoeLayout:
    width = _expert_width(spec.intermediate_size - shared, recipe)
    stored = _round_up(shared, recipe.pad_to) if shared else target.stub_width(width)
    if shared and target.shared == "multiple":
        width = max(width, recipe.pad_to)
        stored = shared
    rescale = RESCALES.get(recipe.rescale.name if recipe.rescale else splitter.default_rescale)()
    combine = target.combine(rescale, recipe.num_experts, recipe.top_k)
    return MoeLayout(recipe.num_experts, recipe.top_k, width, shared, stored, dense_layers, combine)


def _refusals(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout, dtype: str) -> list[str]:
    reasons = target.refusals(spec)
    if layout.num_shared and target.shared == "none":
        reasons.append(
            f"{target.name} has no shared expert, but {layout.num_shared} neurons are to be shared (--shared 0, or another --target)"
        )
    elif layout.num_shared and target.shared == "multiple" and layout.num_shared % layout.expert_width:
        reasons.append(_nearest_shared(spec, recipe, target, layout))
    dense = target.dense_layer_refusal(layout.dense_layers, spec.num_layers)
    if dense:
        reasons.append(dense)
    if recipe.require and recipe.require not in target.majors(spec):
        reasons.append(
            f"--require {recipe.require}: {target.name} needs transformers 5 for this source ({', '.join(sorted(target.needs_five))})"
        )
    if dtype != "F32":
        if spec.norm_offset:
            reasons.append(f"{spec.family}'s norm weights become 1 + w, which {dtype} would round: use --dtype float32")
        fold = target.fold(spec)
        if not is_power_of_two(fold):
            reasons.append(
                f"{target.name} has no embedding multiplier and {dtype} would round embeddings times {fold:g}: use --dtype float32"
            )
    return reasons


def _nearest_shared(spec: DenseSpec, recipe: SplitRecipe, target: Target, layout: MoeLayout) -> str:
    size, wanted = spec.intermediate_size, layout.num_shared
    sizes = {_widths_shared(m, size, recipe): m for m in range(4 * recipe.num_experts, 0, -1)}
    near = sorted((s for s in sizes if s < size), key=lambda s: abs(s - wanted))[:2]
    ways = " or ".join(f"--shared {sizes[s]}x ({s} neurons)" for s in sorted(near))
    return f"{target.name}'s shared expert is a multiple of the expert width ({layout.expert_width}), which {wanted} is not: use {ways}"


# ---- choices ----------------------------------------------------------------------------------------------------


def _resolved(
    recipe: SplitRecipe, splitter: type[Splitter], target: Target, layout: MoeLayout, dtype: str
) -> dict[str, Any]:
    from .recipe import build_recipe

    known = build_recipe(
        {
            "num_experts": recipe.num_experts,
            "top_k": recipe.top_k,
            "router": recipe.router or splitter.default_router,
            "rescale": recipe.rescale or splitter.default_rescale,
        }
    )
    return {
        "shared": layout.num_shared,
        "router": known.router,
        "rescale": known.rescale,
        "target": target.name,
        "dtype": next(name for name, d in DTYPES.items() if d == dtype),
        "keep_dense": layout.dense_layers,
    }


def _source_dtype(model: DenseModel) -> str:
    """The dtype of most weights; float64 becomes float32, which transformers computes in."""
    tally: dict[str, int] = {}
    for name, shape in canonical_shapes(model.spec).items():
        dtype = model.dtype_of(name)
        tally[dtype] = tally.get(dtype, 0) + math.prod(shape)
    most = max(tally, key=lambda d: (tally[d], d))
    return "F32" if most == "F64" else most


def _warnings(model: DenseModel, recipe: SplitRecipe, layout: MoeLayout, dtype: str) -> list[str]:
    found = list(model.checkpoint.notes)
    kinds = {model.dtype_of(name) for name in canonical_shapes(model.spec)}
    lossy = sorted(k for k in kinds if k != dtype and dtype != "F32")
    if lossy:
        found.append(f"weights stored as {', '.join(lossy)} are rounded to {dtype}")
    if recipe.router is not None and recipe.router.name == "zeros":
        found.append("the zeros router sends every token to the same experts until it is trained")
    if recipe.rescale is not None and recipe.rescale.name == "llama_moe":
        found.append("the llama_moe rescale is for reproduction: the output is not exact with any number of experts")
    if dtype == "F16" and recipe.router_scale == "hard":
        found.append(
            "float16 cannot hold router rows as small as a hard router wants: weights are equal only to about 1e-2"
        )
    if not layout.combine.bake_is_exact and dtype != "F32":
        found.append(
            f"the factor {layout.combine.bake:g} is no power of two: the experts' down projections are rounded once more in {dtype}"
        )
    return found


def _advice(spec: DenseSpec, splitter: type[Splitter], target: Target, layout: MoeLayout) -> list[str]:
    found = []
    if splitter.needs in ("nothing", "weights") and layout.top_k < layout.num_experts:
        found.append(
            "split without calibration or training: with all experts the model equals its parent, with top-k it is ruined until it is trained"
        )
    width = layout.expert_width
    if width % 32:
        found.append(f"expert width {width} is no multiple of 32: llama.cpp cannot quantise it (--pad-to 32)")
    elif width % 256:
        found.append(
            f"expert width {width} is no multiple of 256: llama.cpp's k-quants fall back to larger types (--pad-to 256)"
        )
    routed = spec.intermediate_size - layout.num_shared
    padding = layout.num_experts * width - routed
    if padding:
        found.append(
            f"{padding} zero neurons per layer pad the experts to width {width}: exact, and counted in the costs"
        )
    if not layout.combine.any_k:
        found.append(f"the file is right for top-k = {layout.top_k} only: another k needs another factor")
    return found + target.warnings(spec, layout)


# ---- files and costs --------------------------------------------------------------------------------------------


def _shards(tensors: tuple[OutTensor, ...], dtype: str, shard_size: str) -> Shards:
    from huggingface_hub import split_state_dict_into_shards_factory

    entries = {t.name: (t.dtype or dtype, t.shape, math.prod(t.shape) * DTYPE_BYTES[t.dtype or dtype]) for t in tensors}
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry[2],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size.replace(" ", ""),
    )
    return {file: {name: entries[name] for name in names} for file, names in split.filename_to_tensors.items()}


def _parent_cost(model: DenseModel) -> Cost:
    from .costs import role_of

    return count(
        (
            (role_of(n), s, math.prod(s) * DTYPE_BYTES[model.dtype_of(n)])
            for n, s in canonical_shapes(model.spec).items()
        ),
        tied=model.spec.tie_word_embeddings,
    )


def _peak_bytes(spec: DenseSpec, splitter: type[Splitter], dtype: str) -> int:
    """Two gathered FFN matrices, what waits for the disk, and what the splitter works with."""
    from .checkpoint.writer import QUEUE_BYTES

    matrix = spec.intermediate_size * spec.hidden_size
    table = spec.vocab_size * spec.hidden_size
    return (
        QUEUE_BYTES
        + max(2 * matrix, table) * DTYPE_BYTES[dtype]
        + splitter.working_bytes(spec.intermediate_size, spec.hidden_size)
    )


def index_json(shards: Mapping[str, Mapping[str, tuple[str, tuple[int, ...], int]]]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``."""
    return {
        "metadata": {"total_size": sum(n for tensors in shards.values() for _, _, n in tensors.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
