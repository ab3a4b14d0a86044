"""Assemble a run: model, parent, routers, batches, objective, Trainer. Not imported by plans."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..architectures.targets import TARGETS
from ..data.shards import TokenCorpus
from ..errors import UsageError
from ..progress import LOADING, Progress, ProgressCallback, ignore_progress
from .arguments import training_arguments
from .balancing import BiasBalancing
from .batches import Layout, TokenBatches, check_ranks
from .corpora import held_out_corpus, separator_of, training_corpus
from .distillation import Distillation
from .dynamics import Dynamics
from .gates import GATES
from .lora import add_adapters
from .loss_head import LossHead
from .losses import made
from .losses.base import WINDOWS, LossContext, RoutingLoss
from .metrics import MetricsFile, Sums, active_parameters, peak_flops, training_flops
from .mixtures.sampler import MixtureSampler
from .mixtures.updates import MIXTURES
from .mixtures.weights import mixture_weights
from .model import finish_folder, load_model
from .moe_layers import MoeLayer, find_moe_layers
from .objective import Objective, Scale
from .ownership import METRICS, step_of
from .parameters import count_trained, freeze
from .parent import Parent, load_parent, share_frozen
from .parts import Parts
from .ranks import check_same_checkpoint, several_ranks, sum_over_ranks
from .recipe import PretrainRecipe
from .resuming import changes_since
from .routed_targets import routed_targets
from .router_precision import route_in_float32
from .router_start import start_routers
from .routing import RouterTap
from .routing_statistics import RoutingStatistics
from .trainer import MoeTrainer
from .validation import Validation

log = logging.getLogger("llamamoe")


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Make sums on a CPU run in a fixed order, since threads that add in order of arrival would make runs differ.

    On a GPU this is expensive, and left to the recipe (``trainer: {full_determinism: true}``).
    """
    memory: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if device == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a check that costs time and is not needed
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


def choose_device(name: str) -> str:
    """Resolve ``auto`` to a CUDA GPU if there is one; other devices must be named."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def assemble(
    recipe: PretrainRecipe,
    folder: Path,
    source: Path,
    parent: Path | None,
    checkpoint: Path | None,
    progress: ProgressCallback = ignore_progress,
) -> tuple[MoeTrainer, dict[str, Any]]:
    """Build everything that a run needs, ready to train.

    Args:
        recipe: The recipe of the run.
        folder: The run's folder.
        source: The converted model.
        parent: The dense model, if the recipe names one.
        checkpoint: Checkpoint to resume from; None at the start.
        progress: Called after every step.

    Returns:
        The Trainer, and facts about the start for the receipt.
    """
    device = choose_device(recipe.device)
    corpus, held_out = training_corpus(recipe.data), held_out_corpus(recipe.data)
    args = training_arguments(recipe, folder, device, evaluates=held_out is not None)  # joins the other processes
    check_ranks(recipe, args.world_size)
    check_same_checkpoint(-1 if checkpoint is None else step_of(checkpoint), args.device)
    layout = Layout(recipe.batch_size, recipe.micro_batch_size, args.world_size, args.process_index)
    args.gradient_accumulation_steps = layout.accumulation
    torch.manual_seed(recipe.seed)
    batches = _batches(recipe, corpus, layout, args)
    facts: dict[str, Any] = {"world_size": args.world_size, "accumulation": layout.accumulation}
    models = 1 + (parent is not None)
    progress(Progress(LOADING, 1, models, "model", source.name))
    model, layers = _trained_model(recipe, source, checkpoint, device, batches, facts)
    validation = _validation(recipe, held_out, layout)
    if parent is not None:
        progress(Progress(LOADING, 2, models, "model", parent.name))
    old = _parent(recipe, parent, source, device)
    facts["reference_losses"] = _references(recipe, old, validation)
    dynamics = _dynamics(recipe, layers, batches.sampler, facts["reference_losses"], args.world_size > 1)
    if checkpoint is not None:
        dynamics.load(checkpoint)
    sums = Sums(corpus.domains)
    facts["active_parameters"] = active_parameters(model, layers)
    parts = Parts(
        recipe=recipe,
        folder=folder,
        batches=batches,
        objective=_objective(recipe, model, layers, old, corpus.index.eos_token_id, dynamics, sums, layout, facts),
        sums=sums,
        metrics=MetricsFile(folder / METRICS, writes=args.process_index == 0),
        dynamics=dynamics,
        validation=validation,
        finish_checkpoint=lambda path: finish_folder(path, source),
        flops_per_token=_flops_per_token(recipe, model, facts["active_parameters"]),
        peak_flops=_peak_flops(device, args.world_size),
        progress=progress,
    )
    if checkpoint is not None:
        parts.changes = changes_since(checkpoint, recipe)
    return MoeTrainer(model, args, parts, resumed=checkpoint is not None), facts


def _validation(recipe: PretrainRecipe, held_out: TokenCorpus | None, layout: Layout) -> Validation | None:
    if held_out is None:
        return None
    separator = separator_of(recipe.data, held_out)
    return Validation(held_out, recipe.data.block_length, recipe.data.validation_blocks, layout, separator=separator)


def _peak_flops(device: str, world_size: int) -> float | None:
    """Return the peak operations per second of all devices together; None if unknown."""
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    return peak * world_size if peak else None


def _flops_per_token(recipe: PretrainRecipe, model: Any, active_parameters: int) -> float:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head
    return training_flops(active_parameters, config.num_hidden_layers, width, recipe.data.block_length)


def _trained_model(
    recipe: PretrainRecipe,
    source: Path,
    checkpoint: Path | None,
    device: str,
    batches: TokenBatches,
    facts: dict[str, Any],
) -> tuple[Any, list[MoeLayer]]:
    """Return the native model with routers started, frozen groups and adapters, and its MoE layers."""
    adapters = recipe.lora is not None
    model = load_model(source if adapters or checkpoint is None else checkpoint, recipe, device)
    dense = recipe.allow_dense and model.config.model_type not in TARGETS
    layers = [] if dense else find_moe_layers(model)
    if not dense and (adapters or checkpoint is None):
        facts["router_start"], layers = start_routers(model, layers, recipe, batches)
    freeze(model, recipe.freeze)
    if recipe.lora is not None:
        model = add_adapters(model, recipe.lora)
        layers = [] if dense else find_moe_layers(model)
    if recipe.router.float32:
        route_in_float32(layers)
    facts["trained_parameters"] = count_trained(model)
    return model, layers


def _objective(
    recipe: PretrainRecipe,
    model: Any,
    layers: Sequence[MoeLayer],
    parent: Parent | None,
    separator: int,
    dynamics: Dynamics,
    sums: Sums,
    layout: Layout,
    facts: dict[str, Any],
) -> Objective:
    """Return the loss of a micro-batch, with every term normalised by the global batch."""
    losses = made(recipe.losses) if layers else []
    for note in (note for loss in losses for note in loss.notes(dynamics.gate)):
        log.warning("%s", note)
    facts["windows"] = {loss.name: loss.window for loss in losses if loss.window is not None}
    for name, window in facts["windows"].items():
        log.info("%s: balanced over %s", name, WINDOWS[window])
    scale = Scale(
        targets=recipe.batch_size * (recipe.data.block_length - 1),
        tokens=recipe.tokens_per_step,
        turns=layout.accumulation,
        world=layout.world,
    )
    head = LossHead(model, logits_at_once=recipe.logits_at_once)
    distillation = _distillation(recipe, model, parent, separator)
    _slim(recipe, model, parent, facts)
    context = _context(losses, model, parent)
    return Objective(head, RouterTap(layers), losses, context, distillation, dynamics, sums, scale, recipe.max_steps)


def _batches(recipe: PretrainRecipe, corpus: TokenCorpus, layout: Layout, args: TrainingArguments) -> TokenBatches:
    blocks = {name: corpus.num_blocks(name, recipe.data.block_length) for name in corpus.domains}
    warnings: list[str] = []
    weights = mixture_weights(recipe.data.mixture, {name: corpus.tokens(name) for name in corpus.domains}, warnings)
    for sentence in warnings:
        log.warning("data.mixture: %s", sentence)
    sampler = MixtureSampler(blocks, weights, recipe.batch_size, recipe.seed, skip=recipe.skipped_steps)
    return TokenBatches(
        corpus,
        sampler,
        layout,
        recipe.data.block_length,
        recipe.max_steps,
        separator=separator_of(recipe.data, corpus),
        changes_every=recipe.evaluate_every if MIXTURES.get(recipe.data.update.name).dynamic else None,
        pin_for=args.device if args.device.type == "cuda" and args.dataloader_pin_memory else None,
    )


def _distillation(recipe: PretrainRecipe, model: Any, parent: Parent | None, separator: int) -> Distillation | None:
    """Return the terms from the parent."""
    if recipe.distill is None:
        return None
    return Distillation(recipe.distill, model, parent, separator)


def _slim(recipe: PretrainRecipe, model: Any, parent: Parent | None, facts: dict[str, Any]) -> None:
    """Share the parent's weights with the model where they stay equal, and release what no step needs."""
    if parent is not None and recipe.keeps_parent:
        facts["parent_bytes_shared"] = share_frozen(parent, model).bytes_shared
        if not recipe.runs_parent:
            parent.keep_ffns_only()


def _context(losses: Sequence[RoutingLoss], model: Any, parent: Parent | None) -> LossContext:
    """Return the context of the losses on the routing."""
    compares = any(loss.needs_targets for loss in losses)
    return LossContext(
        all_reduce=sum_over_ranks if several_ranks() else None,
        targets=routed_targets(model, parent) if compares and parent is not None else None,
    )


def _dynamics(
    recipe: PretrainRecipe,
    layers: Sequence[MoeLayer],
    sampler: MixtureSampler,
    references: Mapping[str, float],
    distributed: bool,
) -> Dynamics:
    """Attach the gate to the routers, and return everything that changes beside the weights."""
    reduce = sum_over_ranks if distributed else None
    gate = GATES.get(recipe.gate.name)(GATES.get(recipe.gate.name).Options(**recipe.gate.options))
    gate.attach(layers, recipe.seed)
    rule = MIXTURES.get(recipe.data.update.name)
    return Dynamics(
        gate,
        BiasBalancing(layers, recipe.balancing, reduce) if recipe.balancing is not None and layers else None,
        RoutingStatistics(layers, reduce),
        sampler,
        rule(rule.Options(**recipe.data.update.options)),
        references,
        stop_on_collapse=recipe.stop_on_collapse,
    )


def _parent(recipe: PretrainRecipe, folder: Path | None, source: Path, device: str) -> Parent | None:
    """Load the dense model, if anything needs it."""
    if folder is None or not (recipe.keeps_parent or recipe.data.reference_losses == "parent"):
        return None
    where = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    attention = recipe.attn_implementation
    return load_parent(folder, source, dtype=recipe.precision.parent, device=where, attn_implementation=attention)


def _references(recipe: PretrainRecipe, parent: Parent | None, validation: Validation | None) -> dict[str, float]:
    """Return the target loss of every domain for a dynamic mixture."""
    given = recipe.data.reference_losses
    if given is None:
        return {}
    if isinstance(given, dict):
        return dict(given)
    if validation is None or parent is None:
        raise UsageError("data.reference_losses = parent needs held-out text to measure it on (data.validation).")
    with torch.no_grad():
        found = validation.measure(parent.model, LossHead(parent.model, logits_at_once=recipe.logits_at_once))
    losses: dict[str, float] = found["domain_loss"]
    return losses
