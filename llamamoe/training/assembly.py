"""Puts a run together: model, parent, routers, batches, objective, Trainer. Imported by running code only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.mixture import MixtureSampler
from ..data.mixtures import mixture_weights
from ..data.shards import TokenCorpus
from ..errors import UsageError
from ..mixtures import MIXTURES
from ..progress import ProgressCallback, ignore_progress
from ..targets import TARGETS
from .balancing import BiasBalancing
from .batches import Layout, TokenBatches, check_ranks
from .corpora import held_out_corpus, training_corpus
from .distillation import Distillation
from .dynamics import Dynamics
from .gates import GATES
from .lora import add_adapters
from .loss_head import LossHead, next_token_labels
from .losses import LOSSES
from .losses.base import LossContext, RoutingLoss
from .metrics import MetricsFile, Sums, active_parameters, peak_flops, training_flops
from .model import finish_folder, load_model
from .moe_layers import MoeLayer, find_moe_layers
from .objective import Objective, Scale
from .parameters import freeze
from .parent import Parent, load_parent, share_frozen
from .ranks import sum_over_ranks
from .recipe import PretrainRecipe
from .routed_targets import routed_targets
from .router_start import measure_logit_std, renormalise, soften
from .routing import RouterTap
from .routing_statistics import RoutingStatistics
from .run_folder import METRICS
from .sharded_state import reshard
from .trainer import MoeTrainer, Parts, training_arguments
from .validation import Validation

log = logging.getLogger("llamamoe")
HARD_STD = 0.01
"""A router whose logits spread by less than this is a hard one: its weights are equal to 1 %."""
START_BLOCKS = 8
"""Blocks of text on which the spread of the logits is measured."""


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """On a CPU, sums in a fixed order: threads that add to one place as they come would make every run another one.

    On a GPU that costs much, and is left to the recipe (``trainer: {full_determinism: true}``).
    """
    memory: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if device == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a check that costs time, not a part of it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


def choose_device(name: str) -> str:
    """``auto`` is a GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def make_layout(recipe: PretrainRecipe, args: TrainingArguments) -> Layout:
    """Which rank runs what; ranks of one tensor-parallel group see the same data."""
    tensor = recipe.distributed.tp_size
    return Layout(recipe.batch_size, recipe.micro_batch_size, args.world_size // tensor, args.process_index // tensor)


def assemble(
    recipe: PretrainRecipe,
    folder: Path,
    source: Path,
    parent: Path | None,
    checkpoint: Path | None,
    progress: ProgressCallback = ignore_progress,
) -> tuple[MoeTrainer, dict[str, Any]]:
    """Everything that a run needs, ready to train.

    Args:
        recipe: What is asked for.
        folder: The run's folder.
        source: The converted model.
        parent: The dense model, if the recipe names one.
        checkpoint: Where the run goes on; None at its start.
        progress: Told after every step.

    Returns:
        The Trainer, and facts about the start for the receipt.
    """
    device = choose_device(recipe.device)
    corpus, held_out = training_corpus(recipe.data), held_out_corpus(recipe.data)
    args = training_arguments(
        recipe, folder, device, evaluates=held_out is not None
    )  # sets up the process group, if there is one
    check_ranks(recipe, args.world_size)
    layout = make_layout(recipe, args)
    args.gradient_accumulation_steps = layout.accumulation
    torch.manual_seed(recipe.seed)
    batches = _batches(recipe, corpus, layout)
    adapters = recipe.lora is not None
    model = load_model(source if adapters or checkpoint is None else checkpoint, recipe, device)
    dense = recipe.allow_dense and model.config.model_type not in TARGETS
    layers = [] if dense else find_moe_layers(model)
    facts: dict[str, Any] = {}
    if not dense and (adapters or checkpoint is None):
        facts["router_start"], layers = start_routers(model, layers, recipe, batches)
    facts["trained_parameters"] = freeze(model, recipe.freeze)
    if recipe.lora is not None:
        model = add_adapters(model, recipe.lora)
        layers = [] if dense else find_moe_layers(model)
    gate = GATES.get(recipe.gate.name)(GATES.get(recipe.gate.name).Options(**recipe.gate.options))
    gate.attach(layers, recipe.seed)
    validation = None
    if held_out is not None:
        validation = Validation(held_out, recipe.data.block_length, recipe.data.validation_blocks, layout)
    head = LossHead(model, logits_at_once=recipe.logits_at_once)
    old = _parent(recipe, parent, source, device)
    references = _references(recipe, old, validation)
    facts["reference_losses"] = references
    dynamics = _dynamics(recipe, layers, gate, batches.sampler, references, args.world_size > 1)
    if checkpoint is not None:
        dynamics.load(checkpoint)
    losses = [] if dense else _losses(recipe)
    for note in (note for loss in losses for note in loss.notes(gate)):
        log.warning("%s", note)
    distillation = _distillation(recipe, model, old, facts)
    scale = Scale(
        targets=recipe.batch_size * (recipe.data.block_length - 1),
        tokens=recipe.tokens_per_step,
        turns=layout.accumulation,
        world=layout.world,
    )
    sums = Sums(corpus.domains)
    context = _context(losses, model, old, args.world_size > 1)
    objective = Objective(
        head, RouterTap(layers), losses, context, distillation, dynamics, sums, scale, recipe.max_steps
    )
    config = model.config
    active = active_parameters(model, layers)
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    metrics = MetricsFile(folder / METRICS, writes=args.process_index == 0)
    parts = Parts(
        recipe=recipe,
        folder=folder,
        batches=batches,
        objective=objective,
        sums=sums,
        metrics=metrics,
        dynamics=dynamics,
        validation=validation,
        finish_checkpoint=lambda path: finish_folder(path, source),
        flops_per_token=training_flops(active, config.num_hidden_layers, config.hidden_size, recipe.data.block_length),
        peak_flops=peak * args.world_size if peak else None,
        progress=progress,
    )
    facts |= {"active_parameters": active, "world_size": args.world_size, "accumulation": layout.accumulation}
    return MoeTrainer(model, args, parts, resumed=checkpoint is not None), facts


def _batches(recipe: PretrainRecipe, corpus: TokenCorpus, layout: Layout) -> TokenBatches:
    blocks = {name: corpus.num_blocks(name, recipe.data.block_length) for name in corpus.domains}
    warnings: list[str] = []
    weights = mixture_weights(recipe.data.mixture, {name: corpus.tokens(name) for name in corpus.domains}, warnings)
    for sentence in warnings:
        log.warning("data.mixture: %s", sentence)
    sampler = MixtureSampler(blocks, weights, recipe.batch_size, recipe.seed)
    return TokenBatches(corpus, sampler, layout, recipe.data.block_length, recipe.max_steps)


def start_routers(
    model: Any, layers: Sequence[MoeLayer], recipe: PretrainRecipe, batches: TokenBatches
) -> tuple[dict[str, Any], list[MoeLayer]]:
    """Scale hard routers up, so that their weights can tell tokens apart; says what was done, and what it changed."""
    if recipe.router.start_std is None:
        return {}, list(layers)
    inputs = list(_first_blocks(batches, next(model.parameters()).device))
    stds = measure_logit_std(model, layers, inputs)
    hard = {moe.layer for moe, std in zip(layers, stds, strict=True) if 0 < std < HARD_STD}
    for moe, std in zip(layers, stds, strict=True):
        if std == 0:
            log.warning("layer %d: the router's rows are equal: there is nothing to scale up", moe.layer)
    before = _loss(model, inputs, recipe) if hard else 0.0
    if hard:
        layers = renormalise(model, layers)
    pairs = [(moe, std) for moe, std in zip(layers, stds, strict=True) if moe.layer in hard]
    done = soften([moe for moe, _ in pairs], [std for _, std in pairs], recipe.router.start_std) if hard else []
    after = _loss(model, inputs, recipe) if hard else 0.0
    reshard(model)
    if not hard:
        return {}, list(layers)
    log.info("hard routers were scaled up: the loss of the first text goes from %.4f to %.4f", before, after)
    return {"loss_before": before, "loss_after": after, "layers": [asdict(each) for each in done]}, list(layers)


def _loss(model: Any, inputs: Sequence[Mapping[str, Any]], recipe: PretrainRecipe) -> float:
    """Mean loss of a token on a few blocks."""
    head, total, tokens = LossHead(model, logits_at_once=recipe.logits_at_once), 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in inputs:
            losses = head(model, batch, next_token_labels(batch["input_ids"]))
            total, tokens = total + float(losses.nll_sum), tokens + int(losses.counted_BT.sum())
    model.train(training)
    return total / tokens


def _first_blocks(batches: TokenBatches, device: Any) -> Iterator[Mapping[str, Any]]:
    """The first sequences of the run, the same on every rank."""
    domains, blocks = batches.sampler.batch(0)
    for i in range(min(START_BLOCKS, len(domains))):
        ids_1T = batches.corpus.gather(domains[i : i + 1], blocks[i : i + 1], batches.block_length)
        yield {"input_ids": torch.from_numpy(ids_1T).to(device), "use_cache": False}


def _distillation(
    recipe: PretrainRecipe, model: Any, parent: Parent | None, facts: dict[str, Any]
) -> Distillation | None:
    """The terms from the parent; of the parent no more is kept than they need."""
    if recipe.distill is None:
        return None
    found = Distillation(recipe.distill, model, parent)
    if parent is not None and recipe.distill.needs_parent:
        facts["parent_bytes_shared"] = share_frozen(parent, model).bytes_shared
        if not recipe.distill.needs_forward:
            parent.keep_ffns_only()
    return found


def _context(losses: Sequence[RoutingLoss], model: Any, parent: Parent | None, distributed: bool) -> LossContext:
    """What the losses on the routing are told."""
    compares = parent is not None and any(loss.needs_targets for loss in losses)
    return LossContext(
        all_reduce=sum_over_ranks if distributed else None,
        targets=routed_targets(model, parent) if compares and parent is not None else None,
    )


def _losses(recipe: PretrainRecipe) -> list[RoutingLoss]:
    return [LOSSES.get(each.name)(LOSSES.get(each.name).Options(**each.options)) for each in recipe.losses]


def _dynamics(
    recipe: PretrainRecipe,
    layers: Sequence[MoeLayer],
    gate: Any,
    sampler: MixtureSampler,
    references: Mapping[str, float],
    distributed: bool,
) -> Dynamics:
    reduce = sum_over_ranks if distributed else None
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
    """The dense model, if anything asks for it."""
    asked = recipe.distill is not None and recipe.distill.needs_parent
    asked = asked or any(LOSSES.get(each.name).needs_targets for each in recipe.losses)
    if folder is None or not (asked or recipe.data.reference_losses == "parent"):
        return None
    where = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    return load_parent(folder, source, dtype=recipe.precision.parent, device=where)


def _references(recipe: PretrainRecipe, parent: Parent | None, validation: Validation | None) -> dict[str, float]:
    """The loss of every domain that a dynamic mixture aims at."""
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
