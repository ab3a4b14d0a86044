"""Convert one layer: shared neurons, partition, router, repair, and the error of the layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..alignment.layers import AlignedLayer
from ..architectures.moe_layout import Neurons, weight
from ..calibration.walk import read_ffn
from ..checkpoint.tensors import cast, torch_dtype
from ..lazy import np, torch
from ..methods.contributions import router_quality
from ..methods.layer import (
    ExpertWeights,
    FfnWeights,
    LayerContext,
    LayerInputs,
    Partition,
    TokenWeighting,
    token_scales,
)
from ..methods.moe_layer import ConvertedFfn, dense_outputs, parity_before_repair
from ..methods.repairs import REPAIRS
from ..methods.router_scale import scale_router
from ..methods.routers import ROUTERS
from ..methods.selectors import SELECTORS
from ..methods.splitters import SPLITTERS
from ..methods.splitters.base import Splitter
from ..recipes import plugin
from .assembly import LayerParts, router_dtype
from .attention import ConvertedAttention, convert_attention, largest_logit
from .plan import SplitPlan


@dataclass(frozen=True)
class ConvertedLayer:
    """One converted layer, ready to be written.

    Attributes:
        parts: The parts from which tensors are made.
        facts: Facts for the receipt.
        moe: The layer as a function, with the weights as they will be stored; None without calibration inputs.
    """

    parts: LayerParts
    facts: dict[str, Any]
    moe: ConvertedFfn | None = None


def convert_layer(
    plan: SplitPlan,
    layer: int,
    inputs: LayerInputs | None = None,
    given: AlignedLayer | None = None,
    adapt: Callable[[ConvertedFfn, FfnWeights], ConvertedFfn] | None = None,
    attention: ConvertedAttention | None = None,
) -> ConvertedLayer:
    """Split one layer, give it a router, and repair it if the recipe requests it.

    Args:
        plan: The plan of the conversion.
        layer: Index of the layer.
        inputs: Inputs of its FFN on the calibration text; None if no method needs them.
        given: Learned partition, router and weights that replace those of splitter and router.
        adapt: Replaces the layer's function before repair, for variants that only a study can run.
        attention: Its converted attention, if the target routes attention and there is text.
    """
    recipe, layout = plan.recipe, plan.layout
    ffn, context = read_ffn(plan.model, layer), layer_context(plan, layer, inputs)
    splitter: Splitter = plugin(SPLITTERS, recipe.method)
    partition = _split(plan, splitter, ffn, context) if given is None else given.partition
    partition.check(ffn.intermediate_size, overlap=splitter.overlap or layout.copies > 1)
    assert len(partition.shared) == layout.num_shared, f"{recipe.method.name} changed the number of shared neurons"
    weights = splitter.weights(ffn, partition, context) if given is None else given.weights(ffn)
    if given is not None and partition.router_NH is not None:
        rows, facts = _scaled(plan, splitter, partition.router_NH, ffn, context)
    else:
        rows, facts = _router(plan, splitter, ffn, partition, context)
    facts = {"layer": layer} | facts
    if plan.target.attention_experts and attention is None:
        attention = convert_attention(plan, layer, context, None)
    facts |= attention.facts if attention else {}
    heads = attention.heads if attention else None
    if inputs is None:
        return ConvertedLayer(LayerParts(ffn, partition, rows, layout, weights, heads), facts)
    start = ExpertWeights.of_parent(ffn, partition) if weights is None else weights
    moe = as_function(plan, start, partition, rows)
    moe = moe if adapt is None else adapt(moe, ffn)
    if plan.repaired and (given is None or given.matrices is None):
        moe, repair_facts = _repair(plan, splitter, moe, ffn, context)
        if splitter.exact:
            factor = layout.combine.parity_factor
            repair_facts["parity_before_repair"] = parity_before_repair(moe, ffn, inputs, factor)
        facts |= repair_facts
    else:
        facts["output_error"] = output_errors([moe], ffn, inputs)[0]
    if splitter.routed:
        facts["router_quality"] = router_quality(moe, ffn, inputs)
    kept = weights if moe.weights is start else moe.weights
    return ConvertedLayer(LayerParts(ffn, partition, moe.router_NH, layout, kept, heads), facts, as_stored(plan, moe))


def first_partition(plan: SplitPlan, layer: int, inputs: LayerInputs) -> Partition:
    """Return the recipe's partition of one layer, with the router's rows before they are scaled."""
    ffn, context = read_ffn(plan.model, layer), layer_context(plan, layer, inputs)
    splitter: Splitter = plugin(SPLITTERS, plan.recipe.method)
    partition = _split(plan, splitter, ffn, context)
    if not splitter.routed:
        return partition
    return replace(partition, router_NH=plugin(ROUTERS, plan.recipe.router).rows(ffn, partition, context).float().cpu())


def selected_coefficient(plan: SplitPlan) -> float:
    """Return the factor of a selected expert's output under a hard router; 0 if there are no experts."""
    if not plan.layout.num_experts or not plan.target.routed:
        return 0.0
    combine = plan.layout.combine
    weighting = plan.target.router_weighting(combine.weighting)
    return combine.factor * weight(weighting, plan.layout.num_experts, plan.layout.top_k)


def layer_context(plan: SplitPlan, layer: int, inputs: LayerInputs | None = None) -> LayerContext:
    """Return the context that methods get about a layer."""
    layout = plan.layout
    return LayerContext(layer, layout.num_experts, layout.top_k, layout.expert_width, plan.recipe.seed, inputs)


def _split(plan: SplitPlan, splitter: Splitter, ffn: FfnWeights, context: LayerContext) -> Partition:
    return splitter.split(ffn, _shared(plan, splitter, ffn, context), context)


def _shared(plan: SplitPlan, splitter: Splitter, ffn: FfnWeights, context: LayerContext) -> np.ndarray:
    """Return int64 ``[S]``: the selector's choice; any S neurons if the splitter chooses them itself."""
    if splitter.chooses_shared:
        return np.arange(plan.layout.num_shared, dtype=np.int64)
    chosen: np.ndarray = plugin(SELECTORS, plan.recipe.shared_by).select(ffn, plan.layout.num_shared, context)
    return chosen


# ---- router -------------------------------------------------------------------------------------------------------


def _router(
    plan: SplitPlan, splitter: Splitter, ffn: FfnWeights, partition: Partition, context: LayerContext
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the router's rows as they will be stored, and facts about their size."""
    if not splitter.routed:
        return torch.zeros(0, ffn.hidden_size), {}
    rows = plugin(ROUTERS, plan.recipe.router).rows(ffn, partition, context)
    return _scaled(plan, splitter, rows, ffn, context)


def _scaled(
    plan: SplitPlan, splitter: Splitter, rows_NH: torch.Tensor, ffn: FfnWeights, context: LayerContext
) -> tuple[torch.Tensor, dict[str, Any]]:
    rows_NH = splitter.tie(rows_NH)
    largest = None if context.calibration is None else largest_logit(rows_NH, context.calibration)
    dtype = router_dtype(plan.tensors, plan.dtype)
    router = scale_router(rows_NH, ffn.norm_H, plan.recipe.router_scale, dtype, largest=largest)
    bound = router.logit_bound if math.isfinite(router.logit_bound) else None
    facts: dict[str, Any] = {"router_exponent": router.exponent, "router_logit_bound": bound}
    if largest is not None:
        facts["router_largest_logit"] = largest * 2.0**router.exponent
    return router.rows_NH, facts


# ---- the layer as a function --------------------------------------------------------------------------------------


def as_function(plan: SplitPlan, weights: ExpertWeights, partition: Partition, rows_NH: torch.Tensor) -> ConvertedFfn:
    """Return the layer as the plan's target runs it."""
    combine = plan.layout.combine
    return ConvertedFfn(
        weights=weights,
        partition=partition,
        router_NH=rows_NH,
        top_k=plan.layout.top_k,
        scale=plan.recipe.router_scale,
        weighting=plan.target.router_weighting(combine.weighting),
        factor=combine.factor,
        hidden_act=plan.model.spec.hidden_act,
    )


def as_stored(plan: SplitPlan, moe: ConvertedFfn) -> ConvertedFfn:
    """Return the same layer with its weights and rows rounded as the files will hold them, factors included."""
    dtype, weights = torch_dtype(plan.dtype), moe.weights
    rows_dtype = torch_dtype(router_dtype(plan.tensors, plan.dtype))
    downs = {
        t.origin.expert == "shared": t.origin.scale
        for t in plan.tensors
        if isinstance(t.origin, Neurons) and t.origin.part == "down"
    }
    shared = len(moe.partition.shared)
    parts = weights.down_HP[:, :shared], weights.down_HP[:, shared:]
    scales = downs.get(True, 1.0), downs.get(False, 1.0)
    down = [cast(part, dtype, scale).float() / scale for part, scale in zip(parts, scales, strict=True)]
    return replace(
        moe,
        weights=ExpertWeights(weights.gate_PH.to(dtype).float(), weights.up_PH.to(dtype).float(), torch.cat(down, 1)),
        router_NH=moe.router_NH.to(rows_dtype).float(),
    )


def output_errors(
    candidates: Sequence[ConvertedFfn], ffn: FfnWeights, inputs: LayerInputs, weighting: TokenWeighting = "none"
) -> list[float]:
    """Return ``||y - y~|| / ||y||`` over all calibration tokens for each candidate, in one pass.

    Args:
        candidates: Layers that replace the FFN.
        ffn: The dense FFN, which computes y.
        inputs: The tokens.
        weighting: ``"residual"`` counts each token relative to its residual stream.
    """
    missed, whole = [0.0] * len(candidates), 0.0
    scales = token_scales(inputs, weighting)
    outputs = zip(*(moe.outputs(inputs) for moe in candidates), strict=True)
    for part, y_BH, others in zip(inputs.batches(), dense_outputs(inputs, ffn), outputs, strict=True):
        scale = 1.0 if scales is None else scales[part].to(inputs.device)[:, None]
        whole += float((y_BH * scale).double().square().sum())
        for i, other_BH in enumerate(others):
            missed[i] += float(((y_BH - other_BH) * scale).double().square().sum())
    return [math.sqrt(m / whole) if whole else math.sqrt(m) for m in missed]


# ---- repair -------------------------------------------------------------------------------------------------------


def _repair(
    plan: SplitPlan, splitter: Splitter, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext
) -> tuple[ConvertedFfn, dict[str, Any]]:
    """Return the layer after its best repair pass, or unchanged if none helped, and the effect of each pass."""
    recipe = plan.recipe
    assert recipe.repair is not None
    candidates = [moe]
    refitted: dict[int, dict[str, Any]] = {}
    # without a router, further passes would change nothing
    for index in range(recipe.repair_passes if splitter.routed else 1):
        now = candidates[-1]
        if index:
            rows = plugin(ROUTERS, recipe.router).refit(now, ffn, context)
            if rows is not now.router_NH:
                rows, refitted[index] = _scaled(plan, splitter, rows, ffn, context)
                now = replace(now, router_NH=rows)
        candidates.append(replace(now, weights=plugin(REPAIRS, recipe.repair).repair(now, ffn, context)))
    weighting: TokenWeighting = "residual" if recipe.repair.options.get("weighting") == "residual" else "none"
    errors = output_errors(candidates, ffn, context.inputs, weighting)
    # NaN is never the best candidate
    best = min(range(len(errors)), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)
    facts: dict[str, Any] = {
        "output_error_before_repair": errors[0],
        "output_error": errors[best],
        "repair_passes": errors[1:],
        "repair_pass_kept": best,
    }
    for index, found in refitted.items():
        if index < best:
            facts |= found
    if best == 0:
        facts["repair_note"] = f"{recipe.repair.name} did not reduce the error, so the layer is not repaired"
    return candidates[best], facts
