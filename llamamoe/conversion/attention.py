"""Convert the attention of one layer, for targets whose attention is routed: router rows and output projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..architectures.moe_layout import Heads
from ..checkpoint.tensors import cast, torch_dtype
from ..lazy import np, torch
from ..methods.attention import HeadInputs, RoutedHeads, fit_output, head_facts, head_rows
from ..methods.layer import LayerContext, LayerInputs
from ..methods.router_scale import scale_router
from .assembly import router_dtype
from .attention_cost import fits_router
from .plan import SplitPlan

_STD = 0.02
"""Standard deviation of random rows, as in `llamamoe.methods.routers.random`."""


@dataclass(frozen=True)
class ConvertedAttention:
    """The attention of one layer, ready to be written.

    Attributes:
        heads: Router and output projection, in the parent's units.
        facts: Facts for the receipt.
    """

    heads: RoutedHeads
    facts: dict[str, Any]


def convert_attention(
    plan: SplitPlan, layer: int, context: LayerContext, text: HeadInputs | None
) -> ConvertedAttention:
    """Give the query heads of one layer a router, and refit their output if the recipe requests repair.

    Without text, or with the recipe's router ``random``, rows are random, to be trained: weights alone do not tell which
    heads a token needs.

    Args:
        plan: The plan of the conversion.
        layer: Index of the layer.
        context: The context of the layer.
        text: Its attention on the calibration text.
    """
    prefix, layout = f"model.layers.{layer}.", plan.layout
    dense_HQ, norm_H = (
        plan.model.read(prefix + name) for name in ("self_attn.o_proj.weight", "input_layernorm.weight")
    )
    heads = RoutedHeads(
        router_NH=_random_rows(context.rng("attention router"), layout.num_experts, len(norm_H)),
        output_HQ=dense_HQ,
        groups=plan.model.spec.num_kv_heads,
        top_k=layout.top_k,
        scale=plan.recipe.router_scale,
        weighting=plan.target.router_weighting(layout.combine.weighting),
        factor=layout.combine.factor,
    )
    largest = None
    if text is not None:
        heads = replace(heads, router_NH=head_rows(heads, text, context)) if fits_router(plan.recipe) else heads
        largest = largest_logit(heads.router_NH, text.inputs)
    rows = scale_router(heads.router_NH, norm_H, heads.scale, router_dtype(plan.tensors, plan.dtype), largest=largest)
    heads = replace(heads, router_NH=rows.rows_NH)
    if text is None:
        return ConvertedAttention(heads, {})
    facts = head_facts(heads, dense_HQ, text)
    if plan.repaired:
        before = facts["attention_error"]
        heads = fit_output(heads, text, layer)
        facts = {"attention_error_before_repair": before, **head_facts(heads, dense_HQ, text)}
    return ConvertedAttention(heads, facts)


def _random_rows(rng: np.random.Generator, count: int, hidden: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0.0, _STD, (count, hidden))).float()


def largest_logit(rows_NH: torch.Tensor, inputs: LayerInputs) -> float:
    """Return the largest absolute logit on the calibration text. O(T N H)."""
    rows = rows_NH.to(inputs.device).float()
    return max((float((x_BH.float() @ rows.T).abs().max()) for x_BH in inputs.inputs()), default=0.0)


def heads_as_stored(plan: SplitPlan, heads: RoutedHeads) -> RoutedHeads:
    """Return the same heads with weights and rows rounded as the files will hold them, factors included."""
    dtype, rows_dtype = torch_dtype(plan.dtype), torch_dtype(router_dtype(plan.tensors, plan.dtype))
    scale = next(t.origin.scale for t in plan.tensors if isinstance(t.origin, Heads) and t.origin.part == "output")
    return replace(
        heads,
        router_NH=heads.router_NH.to(rows_dtype).float(),
        output_HQ=cast(heads.output_HQ, dtype, scale).float() / scale,
    )
