"""Split the experts of one layer into pieces that are selected one by one, with routers and repair from calibration text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...architectures.moe_checkpoint import ConvertedModel
from ...architectures.moe_layout import MoeLayout, softmax_scores
from ...checkpoint.tensors import cast, torch_dtype
from ...conversion.attention import largest_logit
from ...conversion.layer import output_errors
from ...lazy import np, torch
from ...methods.layer import PADDING, ExpertWeights, LayerContext, LayerInputs, Partition
from ...methods.moe_layer import ConvertedFfn, MixtureFfn
from ...methods.repairs import REPAIRS
from ...methods.router_scale import HARD_BELOW, scale_router
from ...methods.routers.ridge import Ridge
from ...methods.splitters import SPLITTERS
from ...recipes import plugin
from ..finer_experts import padded_pieces
from .recipe import ResplitRecipe

STRENGTHS = (0.125, 0.25, 0.5)
"""Factors of the rows that rank the pieces of an expert, beside its own row; the best on the text is taken.

Half of a log contribution is the logarithm of an output's size: with 0.5 pieces are ranked by the size of what they add to the
layer's output, and with less rather all pieces of fewer experts are selected.
"""
LEAST_TOKENS = 256
"""Tokens that must select an expert for its pieces to be made from these alone; else they are made from all tokens."""


@dataclass(frozen=True)
class PieceRouting:
    """Sizes and methods of a mixture whose pieces are selected one by one.

    Attributes:
        recipe: The recipe.
        source: The mixture.
        layout: The sizes of the result.
        factor: Factor by which its routed outputs are multiplied in its configuration.
        bake: Factor by which they are multiplied in the down projections.
        router_dtype: Safetensors name of the dtype of the router.
        dtype: Safetensors name of the dtype of the experts.
    """

    recipe: ResplitRecipe
    source: ConvertedModel
    layout: MoeLayout
    factor: float
    bake: float
    router_dtype: str
    dtype: str


def mixture_ffn(source: ConvertedModel, layer: int) -> MixtureFfn:
    """Return the routed experts of a layer as the parent of smaller ones."""
    parts, layout, mixing = source.routed(layer), source.layout, source.mixing
    places = np.arange(layout.num_experts * layout.expert_width).reshape(layout.num_experts, layout.expert_width)
    none = np.empty(0, np.int64)
    moe = ConvertedFfn(
        weights=ExpertWeights(parts.gate_PH.float(), parts.up_PH.float(), parts.down_HP.float()),
        partition=Partition(places, none, none),
        router_NH=source.router(layer).float(),
        top_k=layout.top_k,
        scale="soft",
        weighting=source.target.router_weighting(mixing.weighting),
        factor=mixing.factor,
        hidden_act=source.spec.hidden_act,
        bias_N=source.correction_bias(layer),
    )
    norm = torch.ones(source.spec.hidden_size)
    if not source.spec.post_norm:
        norm = source.spec.norm_weight(source.read(f"model.layers.{layer}.{source.spec.ffn_norm}"))
    return MixtureFfn.of(moe, norm)


def finer_layer(
    routing: PieceRouting, layer: int, parent: MixtureFfn, inputs: LayerInputs
) -> tuple[ConvertedFfn, dict[str, Any]]:
    """Split a layer's experts, give the pieces router rows, and refit their down projections.

    Weights of the result are in the units of the source's files. The facts are for the receipt.

    Args:
        routing: The sizes and the methods.
        layer: Index of the layer.
        parent: The layer's routed experts.
        inputs: Inputs of the FFN on the calibration text.
    """
    recipe, layout = routing.recipe, routing.layout
    weights_TN = torch.cat([parent.moe.expert_weights(x_BH).cpu() for x_BH in inputs.inputs()])
    partition, offsets_NH = _pieces(routing, layer, parent, inputs, weights_TN)
    moe, facts = _routed(routing, parent, partition, offsets_NH, inputs)
    context = LayerContext(layer, layout.num_experts, layout.top_k, layout.expert_width, recipe.seed, inputs)
    repaired = replace(moe, weights=plugin(REPAIRS, recipe.repair).repair(moe, parent, context))
    error = output_errors([repaired], parent, inputs)[0]
    better = math.isfinite(error) and error < facts["output_error_before_repair"]
    facts["output_error"] = error if better else facts["output_error_before_repair"]
    facts["tokens_of_least_used_expert"] = int((weights_TN > 0).sum(0).min())
    return (repaired if better else moe), {"layer": layer, **facts}


def _pieces(
    routing: PieceRouting, layer: int, parent: MixtureFfn, inputs: LayerInputs, weights_TN: torch.Tensor
) -> tuple[Partition, torch.Tensor]:
    """Return the partition of each expert into pieces, and rows that rank its pieces by their log contributions."""
    layout, recipe, (count, width) = routing.layout, routing.recipe, parent.moe.partition.experts.shape
    splitter, pieces = plugin(SPLITTERS, recipe.chosen), recipe.pieces
    top_k = min(pieces, max(1, round(layout.top_k / parent.moe.top_k)))
    experts, rows = [], []
    for index in range(count):
        own, expert = own_inputs(inputs, weights_TN[:, index]), parent.expert(index)
        # experts of one layer differ in their random numbers
        context = LayerContext(layer * count + index, pieces, top_k, -(-width // pieces), recipe.seed, own)
        found = splitter.split(expert, np.empty(0, np.int64), context)
        found.check(width)
        slots_mW = np.where(found.experts == PADDING, PADDING, found.experts + index * width)
        experts.append(padded_pieces(slots_mW, layout.expert_width))
        rows.append(Ridge(Ridge.Options()).rows(expert, found, context))
    none = np.empty(0, np.int64)
    return Partition(np.concatenate(experts), none, none), torch.cat(rows)


def own_inputs(inputs: LayerInputs, weight_T: torch.Tensor) -> LayerInputs:
    """Return the tokens that select an expert, whose errors count by its weight; all tokens if these are few.

    Args:
        inputs: All tokens.
        weight_T: The expert's weight for each token, 0 if it is not selected.
    """
    rows = (weight_T > 0).nonzero().flatten()
    if len(rows) < LEAST_TOKENS:
        return replace(inputs, gradients_TH=None, clusters_T=None)
    scale_T = inputs.residual_scale_T[rows] / weight_T[rows]
    return replace(inputs, x_TH=inputs.x_TH[rows], residual_scale_T=scale_T, gradients_TH=None, clusters_T=None)


def _routed(
    routing: PieceRouting, parent: MixtureFfn, partition: Partition, offsets_NH: torch.Tensor, inputs: LayerInputs
) -> tuple[ConvertedFfn, dict[str, Any]]:
    """Return the layer with the best of the routers whose rows are an expert's own row plus those of its pieces.

    A hard router's logits are tiny and only rank experts: they are brought to the size of the others first, and the
    sums are made hard. A correction bias, which ranks experts with them, is scaled as they are: scores are linear in tiny
    logits.
    """
    mode, pieces = router_mode(parent, inputs), routing.recipe.pieces
    size = _spread(parent.moe.router_NH, inputs) if mode == "hard" else 1.0
    bias_N = parent.moe.bias_N
    if bias_N is not None:
        # softmax gives each of m pieces 1/m of its expert's score
        share = pieces if softmax_scores(parent.moe.weighting) else 1
        bias_N = bias_N.repeat_interleave(pieces) / (size * share)
    start = ConvertedFfn(
        weights=ExpertWeights.of_parent(parent, partition),
        partition=partition,
        router_NH=(parent.moe.router_NH / size).repeat_interleave(pieces, 0),
        top_k=routing.layout.top_k,
        scale=mode,
        weighting=parent.moe.weighting,
        factor=routing.factor * routing.bake,
        hidden_act=parent.hidden_act,
        bias_N=bias_N,
    )
    sums = [start.router_NH + strength * offsets_NH for strength in STRENGTHS]
    candidates = [_stored_router(routing, parent, replace(start, router_NH=rows), inputs) for rows in sums]
    errors = [error if math.isfinite(error) else math.inf for error in output_errors(candidates, parent, inputs)]
    best = errors.index(min(errors))
    facts = {"router": mode, "router_strength": STRENGTHS[best], "output_error_before_repair": errors[best]}
    return candidates[best], facts


def router_mode(parent: MixtureFfn, inputs: LayerInputs) -> Literal["hard", "soft"]:
    """Return whether a mixture's router gives all selected experts about equal weights on the text."""
    return "hard" if largest_logit(parent.moe.router_NH, inputs) < HARD_BELOW else "soft"


def _spread(rows_NH: torch.Tensor, inputs: LayerInputs) -> float:
    """Return the root mean square, over all tokens, of the logits minus their mean over the experts; 1 if it is 0."""
    rows, total = rows_NH.to(inputs.device), 0.0
    for x_BH in inputs.inputs():
        logits_BN = x_BH.float() @ rows.T
        total += float((logits_BN - logits_BN.mean(1, keepdim=True)).double().square().sum())
    return math.sqrt(total / max(inputs.num_tokens * len(rows), 1)) or 1.0


def _stored_router(routing: PieceRouting, parent: MixtureFfn, moe: ConvertedFfn, inputs: LayerInputs) -> ConvertedFfn:
    """Return the same layer with router rows and correction bias as the files will hold them."""
    largest = largest_logit(moe.router_NH, inputs)
    scaled = scale_router(moe.router_NH, parent.norm_H, moe.scale, routing.router_dtype, largest=largest)
    rows_NH = scaled.rows_NH.to(torch_dtype(routing.router_dtype)).float()
    bias_N = None if moe.bias_N is None else moe.bias_N * 2.0**scaled.exponent
    return replace(moe, router_NH=rows_NH, bias_N=bias_N)


def as_stored(routing: PieceRouting, moe: ConvertedFfn) -> ConvertedFfn:
    """Return the same layer with its weights rounded as the files will hold them, factors included."""
    dtype, weights = torch_dtype(routing.dtype), moe.weights
    down = cast(weights.down_HP, dtype, routing.bake).float() / routing.bake
    gate, up = (matrix.to(dtype).float() for matrix in (weights.gate_PH, weights.up_PH))
    return replace(moe, weights=ExpertWeights(gate, up, down))
