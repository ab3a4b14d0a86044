"""What is checked before a run loads anything: model, parent and tokens belong together, and the folder is free."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.contents import content_fingerprint
from ..checkpoint.reader import SafetensorsCheckpoint
from ..errors import CheckpointError, RefusedError, UsageError
from ..preflight import check_apart, check_kind
from .corpora import held_out_corpus, training_corpus
from .fit import check_fit
from .run_folder import FACTS, FINAL, METRICS, RECEIPT, RECIPE, checkpoints, discard_partial, marker, start_anew

if TYPE_CHECKING:
    from ..progress import ProgressCallback
    from .recipe import PretrainRecipe


def check_place(out: Path, recipe: PretrainRecipe, source: Path, parent: Path | None) -> None:
    """Refuse a run's folder that lies in what the run reads, or holds it, before anything is written.

    Raises:
        RefusedError: So it does, or it is not a folder; see `llamamoe.preflight.check_apart` and `check_kind`.
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
    """What the run is made from: fingerprints of model, parent and tokens, checked against each other and the recipe."""
    checkpoint = SafetensorsCheckpoint(source)
    found: dict[str, Any] = {"model": content_fingerprint(checkpoint.tensors, checkpoint.config)}
    if parent is not None:
        if not parent.is_dir():
            raise CheckpointError(f"parent: {parent} is no folder.", hint="Give the folder with config.json.")
        dense = SafetensorsCheckpoint(parent)
        found["parent"] = content_fingerprint(dense.tensors, dense.config)
    train, held_out = training_corpus(recipe.data), held_out_corpus(recipe.data)
    for key, corpus in (("train", train), ("validation", held_out)):
        if corpus is not None:
            corpus.check_tokenizer(source)
            found[key] = corpus.fingerprint
    check_fit(recipe, checkpoint, train, held_out)
    return found


def verify_tokens(recipe: PretrainRecipe, progress: ProgressCallback) -> None:
    """Are the tokens still those that were made?"""
    for corpus in (training_corpus(recipe.data), held_out_corpus(recipe.data)):
        if corpus is not None:
            corpus.verify(progress)


def check_run_folder(folder: Path, recipe: PretrainRecipe, facts: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Refuse to mix two runs; drop what a kill left half-written."""
    if force and not resume:
        _clear(folder)
    discard_partial(folder)
    there = checkpoints(folder)
    if not resume and (there or (folder / METRICS).exists() or (folder / FINAL).exists()):
        raise UsageError(
            f"{folder} holds a run already.",
            hint="Go on with it by --resume, drop it by --force, or give another --out.",
        )
    if resume and there:
        if marker(there[-1]).get("recipe_sha256") != recipe.sha256():
            raise RefusedError(
                f"{there[-1]} was made by another recipe: going on with this one would not be the same run.",
                hint=f"The run's own recipe is {folder / RECIPE}; to train on differently: {start_anew(recipe, there[-1])}.",
            )
        before = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        for key, value in facts.items():
            if before.get(key) != value:
                raise RefusedError(
                    f"{key}: this is not what the run in {folder} began with: it has changed since.",
                    hint="Put back what it was, or start a new run in another --out.",
                )


def _clear(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / FINAL, ignore_errors=True)
    for name in (METRICS, RECIPE, RECEIPT, FACTS):
        (folder / name).unlink(missing_ok=True)
