"""Estimate the bytes that the experts of a step move in a device's memory, and between devices, from shapes alone.

Operations say nothing of these: grouped products copy each token once for each of its k experts, and with fine experts
(a large k, a small W) the copies take as long as the products. Counted are the tensors that torch reads and writes in
transformers' grouped products, beside the products themselves, in numbers for each of the ``k T`` rows:

* forward ``6H + 2H/k + 5W``: gather tokens (``H + H/k``), activate (``5W``), weight the outputs (``2H``), put them back
  in order (``2H``), sum them for each token (``H + H/k``);
* backward ``13H + 3H/k + 13W``: copy the gradient for each expert, weight it, that of the weights, put it in order by
  writing into zeros, activate, sum it for each token by writing into zeros.

Other implementations copy less or run where time is not estimated, and are not counted.
"""

from __future__ import annotations

from ..recipe import PretrainRecipe
from .activations import Pass
from .shapes import LayerShape


def copied_bytes(recipe: PretrainRecipe, run: Pass) -> int:
    """Return the bytes of the copies of a micro-batch on one device, over all layers; with checkpointing forward twice."""
    if run.style != "grouped" or not run.model.top_k:
        return 0
    hidden, k = run.model.hidden_size, run.model.top_k
    forwards = 2 if recipe.gradient_checkpointing else 1
    total = 0.0
    for width in (layer.expert_width for layer in run.model.layers if layer.expert_width):
        forward = 6 * hidden + 2 * hidden / k + 5 * width
        total += run.rows * (forwards * forward + 13 * hidden + 3 * hidden / k + 13 * width)
    return round(total * run.widths.experts)


def exchanged_bytes(recipe: PretrainRecipe, run: Pass) -> int:
    """Return the bytes that one rank sends of a micro-batch's tokens to the ranks of their experts, and back.

    Each row goes there and back, and its gradient too; experts of the own rank need no sending.
    """
    if run.ep_size == 1:
        return 0
    times = 6 if recipe.gradient_checkpointing else 4
    layers = sum(1 for layer in run.model.layers if layer.expert_width)
    return round(times * layers * run.rows * (1 - 1 / run.ep_size) * run.model.hidden_size * run.widths.experts)


def gathered_bytes(recipe: PretrainRecipe, run: Pass) -> int:
    """Return the bytes of the experts that FSDP2 alone would receive for a micro-batch: weights twice, gradients once."""
    share = 1 - 1 / max(recipe.distributed.fsdp_size, 1)
    numbers = sum(_experts(layer) for layer in run.model.layers)
    return round(share * numbers * (2 * run.widths.weights + run.widths.stored))


def _experts(layer: LayerShape) -> int:
    return layer.numel.get("experts", 0)
