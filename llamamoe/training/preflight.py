"""Check before a run loads anything that model, parent and tokens match, and that the folder is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.contents import content_fingerprint
from ..checkpoint.files import remove_temporaries, write_text
from ..checkpoint.json_files import read_json
from ..checkpoint.locate import open_parent
from ..checkpoint.out_folder import TRAINED, check_apart, check_kind
from ..checkpoint.reader import SafetensorsCheckpoint
from ..errors import CheckpointError, RefusedError, UsageError
from ..progress import ProgressCallback
from .corpora import held_out_corpus, training_corpus
from .fit import check_fit
from .metrics import check_lines
from .model import check_folder
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
