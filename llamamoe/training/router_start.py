"""Start router training: give a hard router different weights, without changing its selection.

`llamamoe split` stores routers whose logits are below 1/256: all selected experts get equal weights. Such a router has
a gradient, but its weights do not distinguish tokens, and Adam would blow up its rows in its first steps. So
its rows are multiplied by one number per layer (`soften`), after the weights' sum was made independent of the logits'
size (`renormalise`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..architectures.expert_weighting import renormalising, rescaled_block
from ..errors import RefusedError
from ..numerics import wide
from .batches import TokenBatches, model_inputs
from .loss_head import LossHead, next_token_labels
from .moe_layers import MoeLayer
from .native_weights import reshard
from .recipe import PretrainRecipe
from .routing import RouterTap, at_least_float32


@dataclass(frozen=True)
class Softened:
    """The effect of `soften` on one layer.

    Attributes:
        layer: Index of the decoder layer.
        factor: Factor of the router's rows.
        std_before: Standard deviation of the logits over experts, mean over tokens.
        std_after: The same afterwards.
    """

    layer: int
    factor: float
    std_before: float
    std_after: float


def logit_std(logits_TN: torch.Tensor) -> float:
    """Return the (population) standard deviation of the logits over experts, averaged over tokens."""
    return float(wide(at_least_float32(logits_TN).std(-1, correction=0)).mean())


def measure_logit_std(
    model: torch.nn.Module, layers: Sequence[MoeLayer], batches: Iterable[Mapping[str, Any]]
) -> list[float]:
    """Return `logit_std` of every layer over a few batches, with the model in eval mode and without gradients.

    Args:
        model: The model that the layers belong to.
        layers: Its layers, as `find_moe_layers` returns them.
        batches: Keyword arguments of the model's forward, such as ``{"input_ids": ...}``.

    Returns:
        One number per layer, in their order; each batch counts by its tokens.
    """
    sums = dict.fromkeys((moe.place for moe in layers), 0.0)
    tokens = 0
    training = model.training
    tap = RouterTap(layers)
    model.eval()
    try:
        for batch in batches:
            with torch.no_grad(), tap.armed() as routings:
                model(**batch)
            for routing in routings:
                sums[routing.moe.place] += logit_std(routing.logits_TN) * routing.num_tokens
            tokens += routings[0].num_tokens
    finally:
        tap.close()
        model.train(training)
    return [sums[moe.place] / tokens for moe in layers]


def soften(layers: Sequence[MoeLayer], stds: Sequence[float], target_std: float) -> list[Softened]:
    """Multiply every layer's router by one positive number, so that its logits' standard deviation is ``target_std``.

    The ranking of the logits is unchanged. For rows narrower than float32 the factor is the nearest power of two,
    which does not round: ``target_std`` is met within a factor of sqrt(2), see `Softened.std_after`. If the *native*
    router of a hard layer ties (its float32 probabilities cannot distinguish logits that differ by less than about
    1e-7) the softened one decides by the logits.

    Args:
        layers: The layers; their weights must be renormalised, see `renormalise`.
        stds: Standard deviation of each layer, by `measure_logit_std` or `logit_std`.
        target_std: > 0. At 1 the likeliest of 8 experts weighs about 2.9 times the mean (normal logits).

    Raises:
        RefusedError: A layer's weights are not renormalised, its logits are all equal, or it selects by more than its
            logits (a correction bias that is not zero, groups of experts), so that scaling would change its choices.
    """
    for moe, std in zip(layers, stds, strict=True):
        _check(moe, std, target_std)
    found = []
    for moe, std in zip(layers, stds, strict=True):
        factor = target_std / std
        if moe.router_NH.dtype.itemsize < torch.float32.itemsize:
            factor = 2.0 ** round(math.log2(factor))
        with torch.no_grad():
            moe.router_NH.mul_(factor)
        found.append(Softened(moe.layer, factor, std, std * factor))
    return found


def _check(moe: MoeLayer, std: float, target_std: float) -> None:
    if not (target_std > 0 and math.isfinite(target_std)):
        raise ValueError(f"target_std is {target_std}, but must be a positive number")
    where = f"layer {moe.layer}: the router cannot be softened"
    out = "Leave the router as it is (no start temperature), or convert the model with another router."
    if not moe.weighting.endswith("renormalised"):
        raise RefusedError(
            f"{where}, because its weights are not renormalised: the routed sum would change its size.",
            hint="Renormalise it first: llamamoe.training.router_start.renormalise(model, layers).",
        )
    if not (std > 0 and math.isfinite(std)):
        raise RefusedError(f"{where}, because the spread of its logits is {std}: no factor changes that.", hint=out)
    bias = moe.correction_bias
    if bias is not None and bool(bias.any()):
        raise RefusedError(
            f"{where}, because it selects by scores plus a correction bias that is not zero: its choices would change.",
            hint="The model was trained with it already: go on without a start temperature.",
        )
    if int(getattr(moe.router, "num_group", 1)) > 1:
        raise RefusedError(f"{where}, because it selects groups of experts first: its choices would change.", hint=out)


def renormalise(model: torch.nn.Module, layers: Sequence[MoeLayer]) -> list[MoeLayer]:
    """Make the weights of the selected experts sum to a constant, whatever the size of the logits.

    Routers that renormalise are unchanged. Others are switched (``norm_topk_prob = True`` on the configuration and
    on every router), and the mean weight that they have at equal logits is kept: softmax gave each selected expert 1/N
    and now gives 1/k, so the experts' down projections are multiplied by k/N; sigmoid gave 1/2, so
    ``routed_scaling_factor`` is multiplied by k/2. A hard model computes the same as before; k/N is rounded into
    bfloat16 weights unless it is a power of two.

    Args:
        model: The model that the layers belong to; changed in place.
        layers: All of its layers.

    Returns:
        The updated layers, in the same order. Layers found before are out of date.
    """
    changed = [moe for moe in layers if not moe.weighting.endswith("renormalised")]
    factors = {moe.layer: _renormalised_factor(moe) for moe in changed}
    for moe in changed:
        moe.router.norm_topk_prob = True  # type: ignore[assignment]
        if moe.weighting == "softmax":
            with torch.no_grad():
                moe.experts.down_proj.mul_(moe.top_k / moe.num_experts)  # type: ignore[operator]
        else:
            moe.router.routed_scaling_factor = factors[moe.layer]  # type: ignore[assignment]
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if changed and hasattr(config, "norm_topk_prob"):
            config.norm_topk_prob = True
        if changed and isinstance(block := getattr(config, "llamamoe", None), dict):
            first = changed[0]
            sizes = {"num_experts": first.num_experts, "top_k": first.top_k}
            config.llamamoe = rescaled_block(block, **renormalising(sigmoid=first.weighting == "sigmoid", **sizes))
        if any(moe.weighting == "sigmoid" for moe in changed) and hasattr(config, "routed_scaling_factor"):
            config.routed_scaling_factor = factors[changed[0].layer]
    return [_renormalised(moe, factors[moe.layer]) if moe.layer in factors else moe for moe in layers]


def _renormalised_factor(moe: MoeLayer) -> float:
    return moe.factor * 0.5 * moe.top_k if moe.weighting == "sigmoid" else moe.factor


def _renormalised(moe: MoeLayer, factor: float) -> MoeLayer:
    weighting: Any = "renormalised" if moe.weighting == "softmax" else "sigmoid_renormalised"
    return replace(moe, weighting=weighting, factor=factor)


log = logging.getLogger("llamamoe")
HARD_STD = 0.01
"""Spread of logits below which a router counts as hard: its weights are equal to 1 %."""
START_BLOCKS = 8
"""Number of blocks of text on which the spread of the logits is measured."""


def start_routers(
    model: Any, layers: Sequence[MoeLayer], recipe: PretrainRecipe, batches: TokenBatches
) -> tuple[dict[str, Any], list[MoeLayer]]:
    """Scale hard routers up, so that their weights distinguish tokens; return the changes and the updated layers."""
    if recipe.router.start_std is None:
        return {}, list(layers)
    inputs = list(_first_blocks(batches, next(model.parameters()).device))
    stds = measure_logit_std(model, layers, inputs)
    hard = {moe.place for moe, std in zip(layers, stds, strict=True) if 0 < std < HARD_STD}
    for moe, std in zip(layers, stds, strict=True):
        if std == 0:
            log.warning("layer %d: the router's rows are equal: there is nothing to scale up", moe.layer)
    before = _loss(model, inputs, recipe) if hard else 0.0
    if hard:
        layers = renormalise(model, layers)
    pairs = [(moe, std) for moe, std in zip(layers, stds, strict=True) if moe.place in hard]
    done = soften([moe for moe, _ in pairs], [std for _, std in pairs], recipe.router.start_std) if hard else []
    after = _loss(model, inputs, recipe) if hard else 0.0
    reshard(model)
    if not hard:
        return {}, list(layers)
    log.info("hard routers were scaled up: the loss of the first text goes from %.4f to %.4f", before, after)
    return {"loss_before": before, "loss_after": after, "layers": [asdict(each) for each in done]}, list(layers)


def _loss(model: Any, inputs: Sequence[Mapping[str, Any]], recipe: PretrainRecipe) -> float:
    """Return the mean loss of a token on a few blocks."""
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
    """Yield the first sequences of the run, the same on every rank."""
    domains, blocks = batches.sampler.batch(0)
    for i in range(min(START_BLOCKS, len(domains))):
        ids_1T = batches.corpus.gather(domains[i : i + 1], blocks[i : i + 1], batches.block_length)
        inputs = model_inputs(ids_1T, batches.separator)
        yield {**{name: each.to(device) for name, each in inputs.items()}, "use_cache": False}
