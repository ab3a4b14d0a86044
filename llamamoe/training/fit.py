"""Check before a run loads anything that recipe, model and text fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..architectures.targets import TARGETS
from ..checkpoint.reader import SafetensorsCheckpoint
from ..data.shards import TokenCorpus
from ..errors import UsageError
from ..words import plural
from .attention_experts import contradictions
from .corpora import held_out_corpus
from .distillation_options import resolve_layers
from .estimate.shapes import ModelShape, read_shape
from .gates import GATES
from .mixtures.updates import MIXTURES
from .mixtures.weights import mixture_weights
from .moe_layers import CORRECTION_BIAS
from .recipe import PretrainRecipe


def check_fit(
    recipe: PretrainRecipe, model: SafetensorsCheckpoint, train: TokenCorpus, held_out: TokenCorpus | None
) -> None:
    """Refuse settings that would fail after the model is loaded, or during the run.

    Args:
        recipe: The recipe.
        model: The converted checkpoint, or with ``allow_dense`` a dense one, whose routing is not checked.
        train: The training tokens.
        held_out: The held-out tokens.

    Raises:
        UsageError: Settings do not fit; the message names each of them.
    """
    wrong = [*_text(recipe, train, held_out), *_precision(recipe)]
    if recipe.data.documents == "apart" and any(".linear_attn." in name for name in model.tensors):
        wrong.append(
            "data.documents = apart needs attention in all layers: gated delta networks carry text on (leave it joined)"
        )
    shape = read_shape(model.config, model.tensors)
    if shape.model_type in TARGETS:
        if TARGETS.get(shape.model_type).attention_experts:
            wrong += contradictions(recipe, shape.model_type)
        biased = any(name.endswith(CORRECTION_BIAS) for name in model.tensors)
        wrong += _routing(recipe, shape, has_bias=biased)
    wrong += _distillation(recipe, len(shape.layers))
    if len(wrong) == 1:
        raise UsageError(f"{wrong[0]}.")
    if wrong:
        raise UsageError("the recipe does not fit the model and the text:\n  - " + "\n  - ".join(wrong))


def _text(recipe: PretrainRecipe, train: TokenCorpus, held_out: TokenCorpus | None) -> Iterator[str]:
    length, data = recipe.data.block_length, recipe.data
    weights = mixture_weights(data.mixture, {name: train.tokens(name) for name in train.domains})
    trained = [name for name, weight in weights.items() if weight > 0]
    for name in trained:
        if train.num_blocks(name, length) == 0:
            yield (
                f"data.mixture: the domain {name!r} has the weight {weights[name]:.3g}, but its {train.tokens(name):,} tokens are "
                f"less than one block of {length} (more text, a smaller data.block_length, or weight 0)"
            )
    measured = [name for name in held_out.domains if held_out.num_blocks(name, length)] if held_out is not None else []
    if held_out is not None and not measured:
        most = max(held_out.tokens(name) for name in held_out.domains)
        yield (
            f"data.validation: the largest domain has {most:,} tokens, less than one block of {length} "
            "(more held-out text, or a smaller data.block_length)"
        )
    if not MIXTURES.get(data.update.name).dynamic:
        return
    if held_out is None:
        yield f"data.update = {data.update.name} follows held-out losses, but no text is held out (data.validation)"
    elif missing := [name for name in trained if name not in measured]:
        yield f"data.update = {data.update.name}: no text of {', '.join(missing)} is held out, so its loss cannot be measured"
    given = data.reference_losses
    if isinstance(given, dict) and (missing := [name for name in trained if name not in given]):
        yield f"data.reference_losses has no {', '.join(missing)}, which data.update = {data.update.name} needs"


def _precision(recipe: PretrainRecipe) -> Iterator[str]:
    """Refuse to round trained weights to bfloat16 after every step, which drops most of Adam's updates.

    A number w has 8 bits: increments below w / 512 are lost, wherever w is between two powers of two.
    """
    precision = recipe.precision
    if precision.parameters == "float32" or precision.rounding == "stochastic":
        return
    if recipe.lora is not None and not recipe.lora.train_router:
        return
    rate = recipe.optimizer.lr
    if recipe.lora is not None and recipe.optimizer.router_lr is not None:
        rate = recipe.optimizer.router_lr
    ways = "set precision.parameters=float32; precision.compute=bfloat16 keeps products as fast, and distributed.fsdp_size cuts the memory; "
    ways += "or precision.rounding=stochastic"
    if recipe.lora is not None:
        ways += "; or lora.train_router=false, since adapters are float32"
    yield (
        f"precision.parameters = bfloat16 rounds weights after every step, and Adam's steps of about {rate:g} leave every "
        f"weight above {512 * rate:.3g} as it is, most of a model ({ways})"
    )


def _routing(recipe: PretrainRecipe, shape: ModelShape, *, has_bias: bool) -> Iterator[str]:
    wanted = GATES.get(recipe.gate.name).top_k
    if wanted is not None and wanted != shape.top_k:
        yield (
            f"gate = {recipe.gate.name} routes each token to {plural(wanted, 'expert')}, but the model selects {shape.top_k} (gate = top_k, "
            f"or convert with --top-k {wanted})"
        )
    if recipe.balancing is not None and not has_bias:
        yield (
            f"balancing moves correction biases, and the routers of {shape.model_type} have none (a loss: switch or cv_squared; "
            "or convert with --target glm4_moe or ernie4_5_moe)"
        )


def _distillation(recipe: PretrainRecipe, num_layers: int) -> Iterator[str]:
    terms = (recipe.distill.ffn, recipe.distill.hidden) if recipe.distill is not None else ()
    for name, term in zip(("ffn", "hidden"), terms, strict=False):
        if term is not None:
            try:
                resolve_layers(term.layers, (), num_layers)
            except UsageError as error:
                yield f"distill.{name}: {error.message.removeprefix('distill: ').removesuffix('.')}"


def doubts(recipe: PretrainRecipe, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a run can do but hardly should, for the plan and the log.

    Args:
        recipe: What is asked for.
        config: The model's ``config.json``.
    """
    length, positions = recipe.data.block_length, config.get("max_position_embeddings")
    if isinstance(positions, int) and length > positions:
        yield (
            f"data.block_length = {length} is longer than the {positions} positions that the model was made for "
            "(max_position_embeddings): what lies beyond is new to it"
        )
    held_out = held_out_corpus(recipe.data)
    for name in held_out.domains if held_out is not None else ():
        assert held_out is not None
        if held_out.num_blocks(name, length) == 0:
            yield (
                f"data.validation: the domain {name!r} has {held_out.tokens(name):,} tokens, less than one block of {length}: "
                "it is not measured"
            )
