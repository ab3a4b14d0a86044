"""Starts the routers of a model for a run: finds the hard ones on its first text, and scales them up."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from .batches import TokenBatches
from .loss_head import LossHead, next_token_labels
from .moe_layers import MoeLayer
from .router_start import measure_logit_std, renormalise, soften
from .sharded_state import reshard

if TYPE_CHECKING:
    from .recipe import PretrainRecipe

log = logging.getLogger("llamamoe")
HARD_STD = 0.01
"""A router whose logits spread by less than this is a hard one: its weights are equal to 1 %."""
START_BLOCKS = 8
"""Blocks of text on which the spread of the logits is measured."""


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
