"""Estimate operations, time and disk of a training run, from shapes alone.

Operations per token follow PaLM's count (arXiv:2204.02311, appendix B) of *active* parameters, as
`llamamoe.training.metrics.training_flops` does: 2 per parameter in the forward pass, 2 for the gradient of the input, 2
for the gradient of the weight (none of frozen weights), and causal attention's products with half of the matrix.
Omitted are norms, activations, the optimiser, LoRA's sums of weights, communication and reading.
"""

from __future__ import annotations

from ..losses import LOSSES, made
from ..metrics import training_flops
from ..recipe import PretrainRecipe
from .shapes import ModelShape
from .sharding import moment_bytes

DISK_RATE = 1e9
"""Assumed bytes per second of a file system."""


def operations(
    recipe: PretrainRecipe,
    shape: ModelShape,
    parent: ModelShape | None,
    trained: frozenset[str],
    adapters: int,
    tokens: int,
) -> dict[str, float]:
    """Return floating-point operations per token, by purpose.

    Args:
        recipe: The recipe of the run.
        shape: The model.
        parent: Its parent, if a term needs it.
        trained: Trained groups.
        adapters: LoRA's parameters.
        tokens: Tokens of a micro-batch on one rank.

    Returns:
        ``student``: forward and backward pass. ``parent``: its forward pass (its FFNs' only, if that is enough).
        ``competition``: all experts and the targets, for losses that compare experts with the parent.
        ``recomputation``: the layers' forward pass again, with checkpointing. ``head again``: the output head's, where
        the loss runs in chunks.
    """
    length, width, depth = recipe.data.block_length, shape.attention_width, len(shape.layers)
    attention = training_flops(0, depth, width, length)
    head = shape.head or shape.embeddings
    share = shape.top_k / shape.num_experts if shape.num_experts else 1.0
    frozen = 0.0
    for group, numel in shape.by_group().items():
        if group not in trained and (group != "embeddings" or shape.tied):
            frozen += numel * (share if group == "experts" else 1.0)
    again = 2.0 * (shape.active - head) + attention / 3
    chunk = max(1, recipe.logits_at_once // shape.vocab_size)
    return {
        "student": training_flops(shape.active + adapters, depth, width, length) - 2.0 * frozen,
        "parent": _parent(recipe, parent),
        "competition": _competition(recipe, shape, parent),
        "recomputation": again if recipe.gradient_checkpointing else 0.0,
        "head again": 2.0 * head if chunk < tokens else 0.0,
    }


def forward_operations(recipe: PretrainRecipe, shape: ModelShape) -> float:
    """Return floating-point operations per token of the model's forward pass."""
    return training_flops(shape.active, len(shape.layers), shape.attention_width, recipe.data.block_length) / 3


def _parent(recipe: PretrainRecipe, parent: ModelShape | None) -> float:
    distill = recipe.distill
    if parent is None or distill is None or not distill.needs_parent:
        return 0.0
    ffn = sum(layer.numel.get("dense_ffn", 0) for layer in parent.layers)
    total = 0.0
    if distill.needs_forward:
        head = (parent.head or parent.embeddings) if distill.kl is None else 0
        total += 2.0 * (parent.active - head)
        total += training_flops(0, len(parent.layers), parent.attention_width, recipe.data.block_length) / 3
    if distill.ffn is not None:
        layers = distill.ffn.layers
        total += 2.0 * ffn * (1.0 if layers == "all" else len(set(layers)) / len(parent.layers))
    return total


def _competition(recipe: PretrainRecipe, shape: ModelShape, parent: ModelShape | None) -> float:
    """Return the operations of each loss that compares experts with the parent.

    The targets run the FFN and the parent's once more, and the routed part of the former twice; then all experts run,
    and if they are trained, again with both gradients of the down projections and the weight's of the others.
    """
    experts = shape.by_group().get("experts", 0)
    shared = shape.by_group().get("shared", 0)
    total = 0.0
    for loss in made(recipe.losses):
        if LOSSES.get(loss.name).needs_targets:
            targets = shared + 2.0 * experts * shape.top_k / max(shape.num_experts, 1)
            targets += sum(layer.numel.get("dense_ffn", 0) for layer in parent.layers) if parent else 0
            total += 2.0 * (targets + experts * (1 + 1 + 4 / 3 if loss.trains_experts else 1))
    return total


def disk(recipe: PretrainRecipe, shape: ModelShape, trained: int, adapters: int) -> dict[str, int]:
    """Return the bytes on disk.

    A checkpoint holds the weights in the dtype of the parameters and AdamW's moments; with LoRA adapters and moments
    only. ``keep`` of them stay, beside the one with the best held-out loss if that is measured on the way, and one
    more exists while a new one is written. The final model is stored in ``precision.save``, or in the source's dtype.

    Args:
        recipe: The recipe of the run.
        shape: The model.
        trained: Number of trained parameters, adapters included.
        adapters: LoRA's parameters.
    """
    width = 4 if recipe.precision.parameters == "float32" else 2
    weights = 4 * adapters if recipe.lora is not None else width * shape.total
    each = weights + moment_bytes(recipe, trained - adapters, adapters)
    saves = 1 if recipe.save_every is None else -(-recipe.max_steps // recipe.save_every)
    best = recipe.evaluate_every is not None
    count = saves if recipe.keep is None else min(saves, recipe.keep + best + 1)
    stored = {"float32": 4, "bfloat16": 2, None: shape.dtype_bytes}[recipe.precision.save]
    model = stored * shape.total
    return {"checkpoint": each, "checkpoints": count * each, "model": model, "total": count * each + model}


def saving(checkpoint: int, world_size: int, fsdp_size: int, rate: float, *, background: bool) -> dict[str, float]:
    """Return bytes and seconds of a save and of a resume.

    All ranks write at once, each about its share, and hash on the way. Training waits, or continues with a copy of the share
    in each rank's main memory. On a resume the first rank reads the
    whole checkpoint to verify its hashes, then each copy of the model reads it again.

    Args:
        checkpoint: Bytes of a checkpoint.
        world_size: Ranks.
        fsdp_size: Ranks over which one copy of the model is sharded.
        rate: Bytes per second of the file system, of all ranks together.
        background: Whether training continues meanwhile.
    """
    read = checkpoint * (1 + world_size // fsdp_size)
    share = -(-checkpoint // world_size)
    return {
        "save_bytes": checkpoint,
        "save_bytes_of_a_rank": share,
        "copied_bytes_of_a_rank": share if background else 0,
        "save_seconds": checkpoint / rate,
        "resume_bytes": read,
        "resume_seconds": read / rate,
    }
