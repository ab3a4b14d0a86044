"""Plan a conversion from headers and a recipe alone: sizes, names, shards, costs, warnings, refusals.

The plan is pure: it reads no tensor and writes nothing. ``--dry-run`` prints it, the conversion executes it, the
model card quotes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..alignment.cost import AlignmentPlan, plan_alignment
from ..alignment.recipe import MAX_LENGTH
from ..architectures.costs import Cost, count
from ..architectures.dense_checkpoint import DenseModel, stored_dtype
from ..architectures.moe_layout import MoeLayout, OutTensor
from ..architectures.sources.base import DenseSpec, canonical_shapes
from ..architectures.targets.base import Target, common_config
from ..checkpoint.base import DTYPE_BYTES
from ..checkpoint.layout import Shards, deal
from ..checkpoint.tokenizer_plan import plan_warnings
from ..errors import RefusedError
from ..methods.repairs import REPAIRS
from ..methods.splitters.base import Kept, Splitter
from .advice import advice, much_padding
from .assembly import router_dtype
from .calibration_cost import CalibrationPlan, plan_calibration, sequence_length
from .defaults import complete
from .expected_speed import expected_speed
from .recipe import AUTO, DTYPES, SplitRecipe
from .rest import in_files, rest_notes
from .sizes import choose_target, make_splitter, only_target, padded, with_only_experts

_LEARNED: dict[str, Kept] = {"frozen": "neurons", "scales": "gate_up", "ffn": "nothing"}
"""The part of the parent's neurons that alignment keeps, by the weights that it trains."""


@dataclass(frozen=True)
class SplitPlan:
    """The plan of a conversion, which `llamamoe.split` executes.

    Attributes:
        model: The dense checkpoint, opened.
        recipe: The recipe with every choice made.
        target: The architecture to write.
        layout: Sizes and scales.
        dtype: Dtype of the weights, a safetensors name.
        tensors: Every tensor of the output in the order of a forward pass.
        shards: The position of each of them in files.
        config: The output's ``config.json`` without provenance.
        parent_cost: Cost of the dense model.
        cost: Cost of the output.
        peak_bytes: Estimate of the peak anonymous memory of the conversion.
        warnings: Warnings, which ``strict`` turns into refusals.
        advice: Remarks, such as on other runtimes and widths.
        parity: Whether all experts together compute the parent's function.
        majors: Versions of transformers that load the output.
        calibration: Cost of calibration; None if no text is read.
        alignment: Cost of learning through the whole model; None without alignment.
        source_dtype: Dtype of most of the source's weights, a safetensors name.
        repository: What was given of a source on the Hub; None for a path.
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
    calibration: CalibrationPlan | None = None
    alignment: AlignmentPlan | None = None
    source_dtype: str = "F32"
    repository: str | None = None

    @property
    def source(self) -> str:
        """The source: a path, or what was given of one on the Hub."""
        return self.repository or str(self.model.checkpoint.path)

    @property
    def sampling_bytes(self) -> int:
        """Memory of the whole parent, which writes the text first with ``calibration: [auto]``; 0 otherwise."""
        return _sampling_bytes(self.parent_cost, self.recipe)

    @property
    def repaired(self) -> bool:
        """True if weights are fitted to calibration text, so that they differ from the parent's."""
        return self.recipe.repairs

    @property
    def aligns_weights(self) -> bool:
        """True if the FFN's matrices are learned through the whole model, starting from the methods' result."""
        return self.recipe.align is not None and self.recipe.align.weights == "ffn"

    @property
    def fitted(self) -> bool:
        """True if weights differ from the parent's: repaired, or learned."""
        return self.recipe.fits

    @property
    def padding_per_layer(self) -> int:
        """Zero neurons added to the routed experts of one layer."""
        return self.layout.padding(self.model.spec.intermediate_size)

    @property
    def splitter(self) -> Splitter:
        """The splitter with its options."""
        return make_splitter(self.recipe)

    @property
    def kept(self) -> Kept:
        """The part of the parent's neurons that the file must hold bit for bit: `Splitter.kept`, `Repair.keeps`."""
        repair = self.recipe.repair
        left: Kept = REPAIRS.get(repair.name).keeps if self.repaired and repair else "neurons"
        learned: Kept = "neurons" if self.recipe.align is None else _LEARNED[self.recipe.align.weights]
        return min(self.splitter.kept, left, learned, key=("nothing", "gate_up", "neurons").index)

    @property
    def exactness(self) -> str:
        """A sentence on whether the output equals its parent with all experts selected, and under which condition."""
        if not self.target.routed:
            return "not exact: neurons are left out"
        if not self.splitter.exact:
            return "not exact, even with all experts selected"
        experts = "any number of whole copies" if self.layout.copies > 1 else "all experts"
        conditions = self._parity_conditions() if self.layout.copies == 1 else []
        condition = f", if {' and '.join(conditions)}" if conditions else ""
        if not self.fitted:
            return f"exact with {experts} selected{condition}"
        step = "repair" if self.repaired and not self.aligns_weights else "learning"
        return (
            f"not exact, on purpose: the {step} fits the weights to the selected experts; before it, the model with {experts} "
            f"selected computes what its parent computes{condition}"
        )

    def _parity_conditions(self) -> list[str]:
        """Return what has to be changed for the comparison of a partition with its parent."""
        layout = self.layout
        factor = layout.combine.parity_factor
        conditions = ["the soft router's rows are set to zero"] if self.recipe.router_scale == "soft" else []
        if factor != 1.0:
            is_ratio = math.isclose(factor, layout.num_experts / layout.top_k)
            ratio = f" ({layout.num_experts}/{layout.top_k})" if is_ratio else ""
            conditions.append(f"the sum of the experts is multiplied by {factor:.4g}{ratio}")
        return conditions

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data, the same for every run."""
        layout = self.layout
        return {
            "llamamoe": __version__,
            "source": self.source,
            "family": self.model.source.name,
            "target": self.target.name,
            "transformers": list(self.majors),
            "method": self.recipe.method.name,
            "parity": self.parity,
            "exactness": self.exactness,
            "num_experts": layout.num_experts,
            "top_k": layout.top_k,
            "expert_width": layout.expert_width,
            "padding_per_layer": self.padding_per_layer,
            "intermediate_size": self.model.spec.intermediate_size,
            "active_neurons": layout.active_neurons,
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
            "sampling_memory_bytes": self.sampling_bytes,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "alignment": self.alignment.to_json() if self.alignment else None,
            "warnings": list(self.warnings),
            "advice": list(self.advice),
            "speed": expected_speed(layout, self.model.spec, self.target.name),
            "recipe": self.recipe.model_dump(mode="json"),
        }


def _sampling_bytes(parent: Cost, recipe: SplitRecipe) -> int:
    width = 2 if recipe.compute_dtype == "bfloat16" else 4  # float32, or chosen by the machine
    return width * parent.total_parameters if AUTO in recipe.calibration else 0


def plan_split(model: DenseModel, recipe: SplitRecipe, *, text_tokens: int | None = None) -> SplitPlan:
    """Plan a conversion. O(number of tensors); reads headers only.

    Args:
        model: The dense checkpoint.
        recipe: The recipe.
        text_tokens: Maximum number of tokens of the calibration text, from the size of its files; None if not known.

    Raises:
        RefusedError: The conversion would be inexact, impossible or unsafe; the message names every reason.
    """
    spec = model.spec
    chosen = complete(only_target(spec, with_only_experts(spec, recipe)), spec.intermediate_size)
    recipe, splitter = chosen.recipe, chosen.splitter
    dtype = DTYPES[recipe.dtype] if recipe.dtype else stored_dtype(model)
    recipe = padded(spec, recipe, splitter, dtype)
    target, layout = choose_target(spec, recipe, splitter, dtype)
    calibration = None
    if chosen.calibrated:
        routes = {"attention_experts": target.attention_experts}
        calibration = plan_calibration(spec, chosen, layout, text_tokens, **routes)
    recipe = _with_length(spec, recipe)
    alignment = _alignment(spec, recipe, layout, stored_dtype(model))
    recipe = recipe.model_copy(update=_resolved(target, layout, dtype, calibration))
    parent_cost = _parent_cost(model)
    tensors = tuple(target.tensors(spec, layout))
    config = common_config(spec, target, next(n for n, d in DTYPES.items() if d == dtype)) | target.config(spec, layout)
    warnings = [*chosen.warnings, *_warnings(model, recipe, layout, tensors, dtype)]
    warnings += much_padding(spec, recipe, layout)
    if recipe.strict and warnings:
        raise RefusedError("--strict refuses: " + "; ".join(warnings) + ".")
    return SplitPlan(
        model=model,
        recipe=recipe,
        target=target,
        layout=layout,
        dtype=dtype,
        tensors=in_files(model, tensors),
        shards=_shards(in_files(model, tensors), dtype, recipe.shard_size),
        config=model.part.whole_config(config) if model.part else config,
        parent_cost=parent_cost,
        cost=count(
            ((t.role, t.shape, math.prod(t.shape) * DTYPE_BYTES[t.dtype or dtype]) for t in tensors),
            active_share=layout.active_share,
            tied=target.ties(spec),
        ),
        peak_bytes=max(
            _sampling_bytes(parent_cost, recipe),
            _peak_bytes(spec, make_splitter(recipe), layout, dtype)
            + max(calibration.peak_bytes if calibration else 0, alignment.peak_bytes if alignment else 0),
        ),
        warnings=tuple(warnings),
        advice=(
            *model.checkpoint.notes,
            *rest_notes(model),
            *chosen.notes,
            *advice(spec, recipe, calibration, target, layout),
        ),
        parity="exact" if make_splitter(recipe).exact and not recipe.fits else "none",
        majors=("5",) if model.part else target.majors(spec),
        calibration=calibration,
        alignment=alignment,
        source_dtype=stored_dtype(model),
    )


# ---- choices ----------------------------------------------------------------------------------------------------


def _resolved(target: Target, layout: MoeLayout, dtype: str, calibration: CalibrationPlan | None) -> dict[str, Any]:
    return {
        "shared": layout.num_shared,
        "target": target.name,
        "dtype": next(name for name, d in DTYPES.items() if d == dtype),
        "keep_dense": layout.dense_layers,
    } | ({"calibration_length": calibration.length} if calibration else {})


def _warnings(
    model: DenseModel, recipe: SplitRecipe, layout: MoeLayout, tensors: tuple[OutTensor, ...], dtype: str
) -> list[str]:
    folder = model.checkpoint.path
    found = plan_warnings(folder, model.spec.vocab_size, model.checkpoint.config) if folder.is_dir() else []
    kinds = {model.dtype_of(name) for name in canonical_shapes(model.spec)}
    lossy = sorted(k for k in kinds if k != dtype and dtype != "F32")
    if lossy:
        found.append(f"weights stored as {', '.join(lossy)} are rounded to {dtype}")
    if recipe.router is not None and recipe.router.name == "zeros":
        found.append("the zeros router sends every token to the same experts until it is trained")
    if recipe.rescale is not None and recipe.rescale.name == "llama_moe":
        found.append(
            "the llama_moe rescale is for reproduction: as stored, the output is not exact with any number of experts"
        )
    if router_dtype(tensors, dtype) == "F16" and recipe.router_scale == "hard":
        found.append(
            "float16 cannot hold router rows as small as a hard router needs: weights are equal only to about 1e-2"
        )
    if not layout.combine.bake_is_exact and dtype != "F32" and not recipe.fits:  # refitted weights are rounded once
        found.append(
            f"the factor {layout.combine.bake:g} is not a power of two: the experts' down projections are rounded once more in {dtype} "
            "(--dtype float32, or a number of experts that is a power of two, avoids it)"
        )
    return found


def _with_length(spec: DenseSpec, recipe: SplitRecipe) -> SplitRecipe:
    """Return the recipe with the length of alignment's sequences.

    Raises:
        RefusedError: They are longer than the model's positions, or the tokens give fewer than two of them.
    """
    options = recipe.align
    if options is None:
        return recipe
    length = sequence_length(options.length, MAX_LENGTH, spec, "align.length", "align.length")
    if options.tokens < 2 * length:
        raise RefusedError(
            f"--align-tokens {options.tokens} makes one sequence of {length} tokens, but two are needed: one is held out.",
            hint=f"Use at least {2 * length}, or shorter sequences (--set align.length={options.tokens // 2}).",
        )
    return recipe.model_copy(update={"align": options.model_copy(update={"length": length})})


def _alignment(spec: DenseSpec, recipe: SplitRecipe, layout: MoeLayout, source_dtype: str) -> AlignmentPlan | None:
    """Return the cost of the recipe's alignment."""
    options = recipe.align
    if options is None:
        return None
    dtype, half_source = recipe.compute_dtype, source_dtype in ("BF16", "F16")
    # without a dtype, only torch can tell whether "auto" finds a processor that is fast in bfloat16
    half = dtype == "bfloat16" or (dtype is None and half_source and recipe.device.startswith("cuda"))
    return plan_alignment(
        spec,
        options,
        layers=spec.num_layers - len(layout.dense_layers),
        num_experts=layout.num_experts,
        compute_bytes=2 if half else 4,
    )


# ---- files and costs --------------------------------------------------------------------------------------------


def _shards(tensors: tuple[OutTensor, ...], dtype: str, shard_size: str) -> Shards:
    entries = {t.name: (t.dtype or dtype, t.shape, math.prod(t.shape) * DTYPE_BYTES[t.dtype or dtype]) for t in tensors}
    return deal(entries, shard_size)


def _parent_cost(model: DenseModel) -> Cost:
    from ..architectures.costs import role_of

    return count(
        (
            (role_of(n), s, math.prod(s) * DTYPE_BYTES[model.dtype_of(n)])
            for n, s in canonical_shapes(model.spec).items()
        ),
        tied=model.spec.tie_word_embeddings,
    )


def _peak_bytes(spec: DenseSpec, splitter: Splitter, layout: MoeLayout, dtype: str) -> int:
    """Estimate the peak: two gathered FFN matrices, bytes waiting for the disk, the splitter and replaced weights."""
    from ..checkpoint.memory import MOST_BYTES
    from ..checkpoint.writer import QUEUE_BYTES

    matrix = spec.intermediate_size * spec.hidden_size
    table = spec.vocab_size * spec.hidden_size
    places = layout.num_shared + layout.num_experts * layout.expert_width
    replaced = 0 if splitter.kept == "neurons" else 4 * places * spec.hidden_size  # bytes of a float32 matrix
    return (
        max(MOST_BYTES, QUEUE_BYTES + max(2 * matrix, table) * DTYPE_BYTES[dtype])
        + 4 * replaced  # three matrices, and one while it is made
        + splitter.working_bytes(spec.intermediate_size, spec.hidden_size)
    )
