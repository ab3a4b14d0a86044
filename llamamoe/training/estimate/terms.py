"""Estimate the bytes of terms beside language modelling: from the parent, and on the routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..gates import GATES
from ..losses import made
from ..recipe import PretrainRecipe
from .activations import Pass


@dataclass(frozen=True)
class Terms:
    """Bytes of the terms beside language modelling, over all layers.

    Attributes:
        forward: Bytes after they have been computed, beside those that the model keeps.
        backward: Bytes that remain, or have replaced them, while the backward pass goes through the layers.
        working: Bytes beside ``forward`` in the forward or backward pass of one layer's term.
    """

    forward: int
    backward: int
    working: int


def distillation_bytes(recipe: PretrainRecipe, run: Pass, parent_width: int) -> Terms:
    """Return the bytes that terms from the parent keep.

    ``kl``: the parent's last hidden states. ``hidden``: of each layer the parent's states and a float32 error, whose
    gradient then waits for the layer. ``ffn``: of each layer the FFN's input (if nothing else keeps it), its output and
    a float32 error, then the gradients of input and output; the parent's FFN runs once more in the backward pass.

    Args:
        recipe: The terms.
        run: The micro-batch.
        parent_width: Neurons of the parent's FFN; 0: unknown.
    """
    if recipe.distill is None:
        return Terms(0, 0, 0)
    parent, layers = 4 if recipe.precision.parent == "float32" else 2, run.model.layers
    converted = sum(1 for layer in layers if layer.expert_width) or len(layers)
    forward = backward = run.numbers * parent if recipe.distill.needs_forward else 0
    working = 0
    if recipe.distill.hidden is not None:
        states = _count(recipe.distill.hidden.layers, len(layers)) * run.numbers
        forward, backward = forward + states * (parent + 4), backward + states * 4
    if recipe.distill.ffn is not None:
        states = _count(recipe.distill.ffn.layers, converted) * run.numbers
        alone = run.widths.casts or recipe.gradient_checkpointing
        forward += states * (4 + run.widths.compute + (run.widths.weights if alone else 0))
        backward += states * 2 * run.widths.weights
        arrays = 5 if recipe.distill.ffn.through_parent else 3
        working = arrays * run.tokens * parent_width * parent + 8 * run.numbers
    return Terms(forward, backward, working)


def routing_bytes(recipe: PretrainRecipe, run: Pass) -> Terms:
    """Return the bytes of routing that losses keep, and of the gradients of the logits."""
    converted = [layer for layer in run.model.layers if layer.expert_width]
    routers = sum(1 + layer.routes_attention for layer in converted)
    experts, losses = run.model.num_experts, made(recipe.losses)
    gate, each = GATES.get(recipe.gate.name), 4 * run.tokens * run.model.num_experts
    if not converted or not losses:
        return Terms(0, 0, 0)
    told = each * sum(loss.kept_TN(noisy=gate.noisy) for loss in losses)
    if recipe.gradient_checkpointing:  # else the graph keeps it
        told += each * (1 + gate.kept_TN) + 12 * run.tokens * run.model.top_k
    if any(loss.needs_inputs for loss in losses) and (recipe.gradient_checkpointing or run.widths.casts):
        told += run.numbers * run.widths.weights
    if any(loss.trains_experts for loss in losses):  # targets, and the experts' weights with adapters added
        told += 4 * run.numbers
        adapted = recipe.lora is not None and recipe.lora.experts
        told += max(layer.numel["experts"] for layer in converted) * run.widths.weights if adapted else 0
    working = max(
        loss.working_numbers(run.tokens, experts, run.model.hidden_size, layer.expert_width)
        for loss in losses
        for layer in converted
    )
    return Terms(routers * told, routers * each, 4 * working)


def _count(layers: str | Sequence[int], known: int) -> int:
    return known if layers == "all" else len(set(layers))
