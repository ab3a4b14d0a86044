"""``llamamoe.pretrain``: continue pretraining a converted model, on one core or a cluster, with exact resumes."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.files import write_text
from ..checkpoint.out_folder import normal_path
from ..errors import LlamaMoeError, StoppedError
from ..lazy import check_transformers
from ..progress import RESUMED, Progress, ProgressCallback, ignore_progress
from .fit import doubts
from .joint_start import joint_start
from .metrics import read_lines
from .model import check_folder
from .ownership import FACTS, METRICS, TEACHER, run_id, step_of
from .places import find_models
from .preflight import check_place, check_run_folder, identities, prepare_run_folder, verify_tokens
from .recipe import PretrainRecipe
from .resuming import chosen
from .run_folder import best_checkpoint, locked, refuse_used
from .stopping import on_sigterm
from .teacher import drop_checkpoints, finished_teacher, teacher_recipe
from .tracking import same_tracked_run

log = logging.getLogger("llamamoe")


@dataclass(frozen=True)
class PretrainResult:
    """The result of a run.

    Attributes:
        out: The run's folder.
        model: Folder of the trained model in it, a native checkpoint.
        steps: Total number of optimiser steps.
        tokens: Total number of tokens.
        first: The first validation's loss and domains, if there was one.
        last: The last validation's loss and domains.
        best: The checkpoint that is kept for its lowest held-out loss, and that loss; None if none was measured.
        receipt: All facts about the run, as JSON-compatible data.
        teacher_tokens: Tokens that the parent was trained on first; they count, too.
    """

    out: Path
    model: Path
    steps: int
    tokens: int
    first: dict[str, Any] | None
    last: dict[str, Any] | None
    best: tuple[Path, float] | None
    receipt: dict[str, Any]
    teacher_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return {
            "out": str(self.out),
            "model": str(self.model),
            "steps": self.steps,
            "tokens": self.tokens,
            "teacher_tokens": self.teacher_tokens,
            "first_validation": self.first,
            "last_validation": self.last,
            "best_checkpoint": None if self.best is None else {"path": str(self.best[0]), "loss": self.best[1]},
            "receipt": self.receipt,
        }


def pretrain(
    recipe: PretrainRecipe,
    out: str | Path,
    *,
    resume: bool | str | Path = False,
    force: bool = False,
    extend: bool = False,
    allow_change: bool = False,
    profile: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> PretrainResult:
    """Train a converted model by a recipe; under torchrun or accelerate launch every process calls it.

    ``out`` holds the recipe, ``metrics.jsonl``, checkpoints (each a native checkpoint, with the optimiser's state
    beside it) and, at the end, the trained model in ``model/``. If the recipe has a ``teacher``, the parent is trained
    first: ``teacher/`` holds that run, which is resumed in the same way.

    Args:
        recipe: Everything that decides the run.
        out: The run's folder.
        resume: Continue from the newest checkpoint in ``out`` (from the start if there is none): weights and metrics
            end as they would have without the stop. Every byte of it is checked first. With the name or path of a
            checkpoint in ``out``: continue from that one; later ones are deleted and made again.
        extend: Let a resumed run become longer than its checkpoint's (``steps`` or ``tokens``); shares of the length,
            and schedules over it, follow the new length from there on.
        allow_change: Let a resumed run continue with other values of keys that may change within a run; the changes are
            written to ``metrics.jsonl``.
        force: Delete the files of an earlier run in ``out``; other files stay or are a reason to refuse.
        profile: Write a trace of so many steps, after the first, to ``out`` (see `profiling.StepProfile`); 0: none.
        progress: Called after every step.

    Raises:
        RefusedError: The model cannot be trained, or differs from the one at the start of the run; or ``out`` is,
            contains or is inside a folder that is read, or contains a file that the run would write and did not.
            Nothing was changed.
        CheckpointError: The checkpoint is damaged; the message names an older intact one.
        UsageError: The recipe does not fit model or data, another run works in ``out``, or ``out`` holds a run.
        LlamaMoeError: The run failed, such as by a loss that is not finite or a full disk; the last good checkpoint is
            kept.
        StoppedError: The process received SIGTERM, finished its step and wrote a checkpoint.
        ElsewhereError: Another process of the run failed, and reports why.
    """
    how = {"resume": resume, "force": force, "extend": extend, "allow_change": allow_change}
    with joint_start() as join:
        return _pretrain(recipe, normal_path(out), how, join, profile, progress)


def _pretrain(
    recipe: PretrainRecipe,
    folder: Path,
    how: dict[str, Any],
    join: Callable[[], None],
    profile: int,
    progress: ProgressCallback,
) -> PretrainResult:
    """Check everything, and run once all processes have."""
    check_transformers()
    model, parent = find_models(recipe)
    source = model.path
    check_place(folder, recipe, source, parent)
    config = check_folder(source, allow_dense=recipe.allow_dense)
    facts = identities(recipe, source, parent)
    if int(os.environ.get("RANK", "0")) != 0:  # the first process checks, cleans and locks before it joins the others
        join()
        return _run(recipe, folder, source, parent, facts, how, profile, progress)
    refuse_used(folder)
    for sentence in doubts(recipe, config):
        log.warning("%s", sentence)
    check_run_folder(folder, recipe, facts, **how)  # before anything is made, the folder among it
    if recipe.data.verify:
        verify_tokens(recipe, progress)
    with locked(folder):
        checkpoint = check_run_folder(folder, recipe, facts, **how)
        try:
            prepare_run_folder(folder, recipe, checkpoint, force=how["force"])
        except OSError as error:
            raise LlamaMoeError(f"{error.filename or folder} cannot be changed: {error.strerror or error}.") from error
        join()
        return _run(recipe, folder, source, parent, facts, how, profile, progress)


def _run(
    recipe: PretrainRecipe,
    folder: Path,
    source: Path,
    parent: Path | None,
    facts: dict[str, Any],
    how: dict[str, Any],
    profile: int,
    progress: ProgressCallback,
) -> PretrainResult:
    from .build import assemble, choose_device, deterministic
    from .export import export

    started = time.monotonic()
    taught = 0
    if recipe.teacher is not None:
        parent, taught = _train_teacher(recipe, folder, how, progress)
    newest = chosen(folder, how["resume"])
    if newest is not None:
        progress(Progress(RESUMED, step_of(newest), recipe.max_steps, "step"))
    tracked = same_tracked_run(recipe.trainer.get("report_to"), run_id(folder))
    with deterministic(choose_device(recipe.device)), on_sigterm() as stop, tracked:
        trainer, start = assemble(recipe, folder, source, parent, newest, progress)
        trainer.parts.stop = stop
        _train(trainer, start, folder, facts, newest, profile)
        receipt = _receipt(recipe, start, trainer, started, taught)
    if trainer.state.global_step < recipe.max_steps:
        raise StoppedError(
            f"told to end (SIGTERM): stopped after step {trainer.state.global_step}, whose checkpoint is whole.",
            hint=f"The same with --resume goes on from there ({folder}).",
        )
    model = export(trainer, folder, source, receipt)
    lines = read_lines(folder / METRICS) if (folder / METRICS).exists() else []
    validations = [line for line in lines if line.get("kind") == "validation"]
    return PretrainResult(
        out=folder,
        model=model,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * recipe.tokens_per_step,
        first=validations[0] if validations else None,
        last=validations[-1] if validations else None,
        best=best_checkpoint(folder),
        receipt=receipt,
        teacher_tokens=taught,
    )


def _train_teacher(
    recipe: PretrainRecipe, folder: Path, how: dict[str, Any], progress: ProgressCallback
) -> tuple[Path, int]:
    """Train the parent in the run's folder, unless that is done, and return its model and the number of its tokens."""
    given = teacher_recipe(recipe)
    tokens, resume = given.max_steps * given.tokens_per_step, how["resume"] is not False
    if resume and (model := finished_teacher(folder)) is not None:
        return model, tokens

    def report(done: Progress) -> None:
        progress(replace(done, stage=f"{done.stage} {TEACHER}"))

    result = pretrain(given, folder / TEACHER, **(how | {"resume": resume}), progress=report)
    if int(os.environ.get("RANK", "0")) == 0:
        drop_checkpoints(result.out)
    gc.collect()  # its weights and moments
    return result.model, tokens


def _train(
    trainer: Any, start: dict[str, Any], folder: Path, facts: dict[str, Any], newest: Path | None, profile: int
) -> None:
    """Train to the end; ``start`` receives the facts about the start of the run."""
    if newest is None:
        start |= facts
        if trainer.args.should_save:
            write_text(folder / FACTS, json.dumps(start, indent=1) + "\n")
    else:
        start.clear()
        start |= json.loads((folder / FACTS).read_text(encoding="utf-8"))
    from .profiling import StepProfile

    trace = StepProfile(folder, run_id(folder) or "", profile)
    if profile:
        trainer.add_callback(trace)
    try:
        with trainer.checkpoints.finished():
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        trace.close()


def _receipt(
    recipe: PretrainRecipe, start: dict[str, Any], trainer: Any, started: float, teacher_tokens: int
) -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "safetensors")
    return {
        "llamamoe": __version__,
        "trained": {
            "version": __version__,
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * recipe.tokens_per_step,
            "teacher_tokens": teacher_tokens,
            "recipe_sha256": recipe.sha256(),
        },
        "start": start,
        "mixture": trainer.parts.dynamics.sampler.state_dict(),
        "versions": {name: version(name) for name in packages},
        "run": {"seconds": round(time.monotonic() - started, 1), "device": str(trainer.args.device)},
    }
