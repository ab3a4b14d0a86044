"""Plan a conversion from headers and a recipe alone: sizes, names, shards, costs, warnings, refusals.

The plan is pure: it reads no tensor and writes nothing. ``--dry-run`` prints it, the conversion executes it, the
model card quotes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..alignment.cost import AlignmentPlan
from ..architectures.costs import Cost
from ..architectures.dense_checkpoint import DenseModel, stored_dtype
from ..architectures.moe_layout import MoeLayout, OutTensor
from ..architectures.targets.base import Target, common_config
from ..checkpoint.layout import Shards
from ..errors import RefusedError
from ..methods.repairs import REPAIRS
from ..methods.splitters.base import Kept, Splitter
from .advice import advice, plan_warnings
from .alignment_cost import alignment_cost, with_length
from .calibration_cost import CalibrationPlan, plan_calibration
from .defaults import complete
from .expected_speed import expected_speed
from .recipe import DTYPES, SplitRecipe
from .rest import in_files, rest_notes
from .sizes import choose_target, make_splitter, only_target, padded, with_only_experts
from .weights_cost import cost_of_output, cost_of_parent, sampling_bytes, shards_of, writing_bytes

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
        return sampling_bytes(self.parent_cost, self.recipe)

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


def plan_split(model: DenseModel, recipe: SplitRecipe, *, text_tokens: int | None = None) -> SplitPlan:
    """Plan a conversion. O(number of tensors); reads headers only.

    Args:
        model: The dense checkpoint.
        recipe: The recipe.
        text_tokens: Maximum number of tokens of the calibration text, from the size of its files; None if not known.

    Raises:
        RefusedError: The conversion would be inexact, impossible or unsafe; the message names every reason.
    """
    spec, chosen = model.spec, _choices(model, recipe, text_tokens)
    recipe, target, layout, dtype = chosen.recipe, chosen.target, chosen.layout, chosen.dtype
    tensors = tuple(target.tensors(spec, layout))
    warnings = (*chosen.warnings, *plan_warnings(model, recipe, layout, tensors, dtype))
    if recipe.strict and warnings:
        raise RefusedError("--strict refuses: " + "; ".join(warnings) + ".")
    parent_cost = cost_of_parent(model)
    text_bytes = max((each.peak_bytes for each in (chosen.calibration, chosen.alignment) if each), default=0)
    splitter = make_splitter(recipe)
    config = common_config(spec, target, next(n for n, d in DTYPES.items() if d == dtype)) | target.config(spec, layout)
    return SplitPlan(
        model=model,
        recipe=recipe,
        target=target,
        layout=layout,
        dtype=dtype,
        tensors=in_files(model, tensors),
        shards=shards_of(in_files(model, tensors), dtype, recipe.shard_size),
        config=model.part.whole_config(config) if model.part else config,
        parent_cost=parent_cost,
        cost=cost_of_output(spec, target, layout, tensors, dtype),
        peak_bytes=max(sampling_bytes(parent_cost, recipe), writing_bytes(spec, splitter, layout, dtype) + text_bytes),
        warnings=warnings,
        advice=(
            *model.checkpoint.notes,
            *rest_notes(model),
            *chosen.notes,
            *advice(spec, recipe, chosen.calibration, target, layout, text_only=model.part is None),
        ),
        parity="exact" if splitter.exact and not recipe.fits else "none",
        majors=("5",) if model.part else target.majors(spec),
        calibration=chosen.calibration,
        alignment=chosen.alignment,
        source_dtype=stored_dtype(model),
    )


# ---- choices ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choices:
    """A recipe with every choice made, and what follows from the choices alone.

    Attributes:
        recipe: The recipe.
        target: The architecture to write.
        layout: Sizes and scales.
        dtype: Dtype of the weights, a safetensors name.
        calibration: Cost of calibration; None if no text is read.
        alignment: Cost of learning through the whole model; None without alignment.
        warnings: Choices that replace a better one.
        notes: Sizes that differ from those that were asked for or are the default, and why.
    """

    recipe: SplitRecipe
    target: Target
    layout: MoeLayout
    dtype: str
    calibration: CalibrationPlan | None
    alignment: AlignmentPlan | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def _choices(model: DenseModel, recipe: SplitRecipe, text_tokens: int | None) -> _Choices:
    """Choose methods, sizes and target, and return them with the cost of the text that they need; see `plan_split`."""
    spec = model.spec
    chosen = complete(only_target(spec, with_only_experts(spec, recipe)), spec.intermediate_size)
    dtype = DTYPES[chosen.recipe.dtype] if chosen.recipe.dtype else stored_dtype(model)
    recipe = padded(spec, chosen.recipe, chosen.splitter, dtype)
    target, layout = choose_target(spec, recipe, chosen.splitter, dtype)
    calibration = None
    if chosen.calibrated:
        routes = {"attention_experts": target.attention_experts}
        calibration = plan_calibration(spec, chosen, layout, text_tokens, **routes)
    recipe = with_length(spec, recipe)
    alignment = alignment_cost(spec, recipe, layout, stored_dtype(model))
    recipe = recipe.model_copy(update=_resolved(target, layout, dtype, calibration))
    return _Choices(recipe, target, layout, dtype, calibration, alignment, chosen.warnings, chosen.notes)


def _resolved(target: Target, layout: MoeLayout, dtype: str, calibration: CalibrationPlan | None) -> dict[str, Any]:
    return {
        "shared": layout.num_shared,
        "target": target.name,
        "dtype": next(name for name, d in DTYPES.items() if d == dtype),
        "keep_dense": layout.dense_layers,
    } | ({"calibration_length": calibration.length} if calibration else {})
