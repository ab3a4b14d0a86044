"""Check before a run loads anything that model, parent and tokens match, and that the folder is free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..architectures.targets import TARGETS
from ..checkpoint.contents import content_fingerprint
from ..checkpoint.files import remove_temporaries, write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.locate import open_parent
from ..checkpoint.out_folder import TRAINED, check_apart, check_kind
from ..checkpoint.reader import SafetensorsCheckpoint
from ..data.shards import TokenCorpus
from ..errors import CheckpointError, RefusedError, UsageError
from ..progress import ProgressCallback
from .attention_experts import contradictions
from .corpora import held_out_corpus, training_corpus
from .distillation_options import resolve_layers
from .estimate.shapes import ModelShape, read_shape
from .gates import GATES
from .metrics import check_lines
from .mixtures.updates import MIXTURES
from .mixtures.weights import mixture_weights
from .model import check_folder
from .moe_layers import CORRECTION_BIAS
from .ownership import (
    FACTS,
    METRICS,
    RECIPE,
    begin,
    check_owned,
    check_removable,
    clear,
    has_teacher,
    named_checkpoints,
    open_staging,
    run_id,
    step_of,
)
from .recipe import PretrainRecipe
from .resuming import check_contents, check_same_run, chosen, warn_of_metrics
from .teacher import check_teacher


def check_place(out: Path, recipe: PretrainRecipe, source: Path, parent: Path | None) -> None:
    """Refuse a run's folder that is inside or contains a folder that the run reads, before anything is written.

    Raises:
        RefusedError: It does, or it is not a folder; see `llamamoe.checkpoint.out_folder.check_apart` and `check_kind`.
    """
    check_apart(out, source, "the model")
    if parent is not None:
        check_apart(out, parent, "its parent")
    for key, corpus in (
        ("data.train", training_corpus(recipe.data)),
        ("data.validation", held_out_corpus(recipe.data)),
    ):
        if corpus is not None:
            check_apart(out, corpus.folder, key)
    check_kind(out)


def identities(recipe: PretrainRecipe, source: Path, parent: Path | None) -> dict[str, Any]:
    """Return fingerprints of model, parent and tokens, checked against each other and the recipe."""
    checkpoint = SafetensorsCheckpoint(source)
    found: dict[str, Any] = {"model": content_fingerprint(checkpoint.tensors, checkpoint.config)}
    if parent is not None:
        dense = open_parent(parent, source)
        found["parent"] = content_fingerprint(dense.tensors, dense.config)
    train, held_out = training_corpus(recipe.data), held_out_corpus(recipe.data)
    for key, corpus in (("train", train), ("validation", held_out)):
        if corpus is not None:
            corpus.check_tokenizer(source)
            found[key] = corpus.fingerprint
    check_fit(recipe, checkpoint, train, held_out)
    return found


def verify_tokens(recipe: PretrainRecipe, progress: ProgressCallback) -> None:
    """Refuse tokens that changed since they were written."""
    for corpus in (training_corpus(recipe.data), held_out_corpus(recipe.data)):
        if corpus is not None:
            corpus.verify(progress)


def check_run_folder(
    folder: Path,
    recipe: PretrainRecipe,
    facts: dict[str, Any],
    *,
    resume: bool | str | Path,
    force: bool,
    extend: bool = False,
    allow_change: bool = False,
) -> Path | None:
    """Refuse to mix two runs, or to touch files that the run did not write; changes nothing.

    Returns:
        The checkpoint to resume from; None for a new run. Its content is not read yet.

    Raises:
        RefusedError: The folder contains files that are not the run's, or the run was started with other inputs.
        CheckpointError: A file of the run is damaged.
        UsageError: It already holds a run, or the checkpoint does not exist.
    """
    check_owned(folder)
    run, model, there = run_id(folder), folder / TRAINED, named_checkpoints(folder)
    if resume is False:
        found = [path for path in (*there, model) if path.exists()]
        if not force and (found or (folder / METRICS).exists() or has_teacher(folder)):
            raise UsageError(
                f"{folder} holds a run already.",
                hint="Go on with it by --resume, drop it by --force, or give another --out.",
            )
        for path in found:
            check_removable(path, run)
        return None
    checkpoint = chosen(folder, resume)
    if checkpoint is None and model.exists():
        raise UsageError(
            f"{folder} holds a trained model, but no checkpoint to go on from.",
            hint="Begin again by --force, or give another --out.",
        )
    for path in (model, *(each for each in there if checkpoint is not None and step_of(each) > step_of(checkpoint))):
        if path.exists():  # the run writes it again
            check_removable(path, run)
    if checkpoint is not None:
        check_same_run(checkpoint, recipe, extend=extend, allow_change=allow_change)
        _check_facts(folder, facts)
        check_lines(folder / METRICS)
    return checkpoint


def _check_facts(folder: Path, facts: dict[str, Any]) -> None:
    try:
        before = read_json(folder / FACTS)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: {error.message} It says what the run began with.",
            hint="Begin again by --force or in another --out; a new run can begin with a checkpoint of this one, by --model.",
        ) from None
    for key, value in facts.items():
        if before.get(key) != value:
            raise RefusedError(
                f"{key}: this is not what the run in {folder} began with: it has changed since.",
                hint="Put back what it was, or start a new run in another --out.",
            )


def prepare_run_folder(folder: Path, recipe: PretrainRecipe, checkpoint: Path | None, *, force: bool) -> None:
    """Prepare a run's folder, once `check_run_folder` has passed and the folder is locked.

    Args:
        folder: The run's folder.
        recipe: The recipe; written into it.
        checkpoint: Checkpoint to resume from.
        force: Delete the files of an earlier run.

    Raises:
        CheckpointError: The checkpoint is damaged, or cannot be trained; nothing was changed.
        RefusedError: The trained parent in the folder is damaged, or of another recipe; nothing was changed.
    """
    if recipe.teacher is not None and not force:
        check_teacher(recipe, folder)
    if checkpoint is not None:
        check_contents(checkpoint, recipe)
        if recipe.lora is None:  # otherwise the model is loaded from the recipe's folder
            check_folder(checkpoint, allow_dense=recipe.allow_dense)
        warn_of_metrics(checkpoint)
    if force:
        clear(folder)
    if run_id(folder) is None:
        begin(folder)
    else:
        remove_temporaries(folder)
        open_staging(folder)
    write_text(folder / RECIPE, recipe.to_yaml())


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
