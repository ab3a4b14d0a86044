"""Convert a model in memory: every layer as a function, by the same steps as ``llamamoe.split``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..alignment.layers import AlignedLayer
from ..calibration.compute import Compute
from ..calibration.gradients import GradientStore
from ..calibration.text import CalibrationText
from ..calibration.walk import Walk, cast_ffn, read_ffn
from ..checkpoint.tensors import torch_dtype
from ..conversion.layer import ConvertedLayer, as_function, as_stored, convert_layer
from ..conversion.plan import SplitPlan
from ..lazy import torch
from ..methods.contributions import contributions
from ..methods.layer import ExpertWeights, FfnWeights, LayerInputs
from ..methods.moe_layer import ConvertedFfn, dense_outputs
from .measure import inputs_of


@dataclass(frozen=True)
class OracleFfn(ConvertedFfn):
    """A converted layer whose router has access to every expert's contribution in the dense FFN.

    The experts with the largest contribution are selected; their weights are as for the layer's own router. A study
    runs it to separate the router's part of a loss from the partition's; it cannot be stored.

    Attributes:
        parent: The dense FFN, whose neurons' contributions count, whatever a repair changed in the experts.
    """

    parent: FfnWeights | None = field(default=None, compare=False)

    def expert_weights(self, x_BH: torch.Tensor, logits_BN: torch.Tensor | None = None) -> torch.Tensor:
        """See `ConvertedFfn.expert_weights`. O(B (F H + P W)) beside it."""
        if logits_BN is not None or self.parent is None:
            return super().expert_weights(x_BH, logits_BN)
        known_BN = next(contributions(self.parent, self.partition, inputs_of(x_BH), hidden_act=self.hidden_act))
        if self.scale == "soft":
            logits_BN = x_BH.float() @ self.router_NH.to(x_BH.device).T
            chosen = known_BN.topk(self.top_k, dim=-1).indices
            known_BN = logits_BN.new_full(logits_BN.shape, float("-inf")).scatter(
                -1, chosen, logits_BN.gather(-1, chosen)
            )
        return super().expert_weights(x_BH, known_BN)


def oracle_of(moe: ConvertedFfn, ffn: FfnWeights) -> OracleFfn:
    """Return the same layer with an oracle in place of its router."""
    kept = {name: getattr(moe, name) for name in ConvertedFfn.__dataclass_fields__}
    return OracleFfn(**kept, parent=ffn)


@dataclass(frozen=True)
class InMemory:
    """A whole conversion as functions.

    Attributes:
        ffns: Converted FFNs by layer; layers that stay dense are missing.
        facts: Facts of every converted layer, as in the receipt.
    """

    ffns: dict[int, ConvertedFfn]
    facts: tuple[dict[str, Any], ...]


def convert_in_memory(
    plan: SplitPlan,
    text: CalibrationText | None,
    compute: Compute,
    *,
    oracle: bool = False,
    by_layer: Sequence[SplitPlan] = (),
    given: Mapping[int, AlignedLayer] | None = None,
    gradients: GradientStore | None = None,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda layer: None,
) -> InMemory:
    """Convert every layer and keep it in memory, with its weights as stored. Memory: the FFNs in float32.

    Args:
        plan: The plan.
        text: The calibration text; None if the plan needs none.
        compute: Device and dtype of large products.
        oracle: Replace every router by an oracle, before anything is repaired.
        by_layer: The plan of each layer if they differ in k, for a study.
        given: Layers learned by alignment, if the plan requests it.
        gradients: Gradients of the parent's loss at the FFN outputs, if a method needs them.
        folder: Folder for hidden states that are too large for memory.
        advance: Called after every layer.
    """
    adapt = oracle_of if oracle else None
    count = plan.model.spec.num_layers
    plans = by_layer or [plan] * count
    converted: dict[int, ConvertedLayer] = {}
    if text is None or plan.calibration is None:
        for layer in range(count):
            if layer not in plan.layout.dense_layers:
                converted[layer] = _without_text(plans[layer], layer, oracle=oracle)
            advance(layer)
        return _gathered(converted)
    dtype = torch_dtype(plan.dtype)
    mapped = folder if plan.calibration.input_place != "memory" else None
    walk = Walk(plan.model, text, compute, weights_dtype=dtype, folder=mapped, map_inputs=mapped is not None,
                gradients=gradients)  # fmt: skip
    walk.start()
    for layer in range(count):
        inputs: LayerInputs = walk.enter(layer)
        if layer in plan.layout.dense_layers:
            outputs = dense_outputs(inputs, cast_ffn(read_ffn(plan.model, layer), dtype))
        else:
            converted[layer] = convert_layer(plans[layer], layer, inputs, (given or {}).get(layer), adapt=adapt)
            moe = converted[layer].moe
            assert moe is not None
            outputs = moe.outputs(inputs)
        if layer + 1 < count:
            walk.leave(layer, outputs)
        advance(layer)
    return _gathered(converted)


def _without_text(plan: SplitPlan, layer: int, *, oracle: bool) -> ConvertedLayer:
    done = convert_layer(plan, layer)
    parts = done.parts
    weights = ExpertWeights.of_parent(parts.ffn, parts.partition) if parts.weights is None else parts.weights
    moe = as_function(plan, weights, parts.partition, parts.router_NH)
    moe = as_stored(plan, oracle_of(moe, parts.ffn) if oracle else moe)
    return ConvertedLayer(parts, done.facts, moe)


def _gathered(converted: dict[int, ConvertedLayer]) -> InMemory:
    ffns = {layer: each.moe for layer, each in converted.items() if each.moe is not None}
    return InMemory(ffns, tuple(each.facts for each in converted.values()))
