"""Does the recipe fit the model and the text? From headers and indexes alone, and everything that does not at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..architectures.targets import TARGETS
from ..errors import UsageError
from .distillation_options import resolve_layers
from .estimate.shapes import read_shape
from .gates import GATES
from .mixtures.updates import MIXTURES
from .mixtures.weights import mixture_weights
from .moe_layers import CORRECTION_BIAS

if TYPE_CHECKING:
    from ..checkpoint.reader import SafetensorsCheckpoint
    from ..data.shards import TokenCorpus
    from .estimate.shapes import ModelShape
    from .recipe import PretrainRecipe


def check_fit(
    recipe: PretrainRecipe, model: SafetensorsCheckpoint, train: TokenCorpus, held_out: TokenCorpus | None
) -> None:
    """Refuse what would go wrong after the model is loaded, or in the middle of the run.

    Args:
        recipe: What is asked for.
        model: The converted checkpoint, or with ``allow_dense`` a dense one, whose routing is not asked about.
        train: What is trained on.
        held_out: What is measured on.

    Raises:
        UsageError: Something does not fit; every such thing is named.
    """
    wrong = list(_text(recipe, train, held_out))
    shape = read_shape(model.config, model.tensors)
    if model.config.get("model_type") in TARGETS:
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
    if held_out is not None:
        for name in (each for each in held_out.domains if held_out.num_blocks(each, length) == 0):
            yield (
                f"data.validation: the domain {name!r} has {held_out.tokens(name):,} tokens, less than one block of {length} "
                "(more held-out text, or a smaller data.block_length)"
            )
    if not MIXTURES.get(data.update.name).dynamic:
        return
    if held_out is None:
        yield f"data.update = {data.update.name} follows held-out losses, but no text is held out (data.validation)"
    elif missing := [name for name in trained if name not in held_out.domains]:
        yield f"data.update = {data.update.name}: no text of {', '.join(missing)} is held out, so its loss cannot be measured"
    given = data.reference_losses
    if isinstance(given, dict) and (missing := [name for name in trained if name not in given]):
        yield f"data.reference_losses has no {', '.join(missing)}, which data.update = {data.update.name} needs"


def _routing(recipe: PretrainRecipe, shape: ModelShape, *, has_bias: bool) -> Iterator[str]:
    wanted = GATES.get(recipe.gate.name).top_k
    if wanted is not None and wanted != shape.top_k:
        yield (
            f"gate = {recipe.gate.name} routes each token to {wanted} experts, but the model selects {shape.top_k} (gate = top_k, "
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
