"""``llamamoe.pretrain``: train a converted model on, on one core or on a cluster, and go on exactly after a stop."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.files import write_text
from ..checkpoint.locate import locate, locate_folder
from ..checkpoint.out_folder import normal_path
from ..errors import LlamaMoeError, StoppedError
from ..lazy import check_transformers
from ..progress import ProgressCallback, ignore_progress
from .metrics import read_lines
from .model import check_folder
from .ownership import FACTS, METRICS, run_id
from .preflight import check_place, check_run_folder, doubts, identities, prepare_run_folder, verify_tokens
from .recipe import PretrainRecipe
from .resuming import chosen
from .run_folder import best_checkpoint, locked, refuse_used
from .stopping import on_sigterm
from .tracking import same_tracked_run

log = logging.getLogger("llamamoe")


@dataclass(frozen=True)
class PretrainResult:
    """The result of a run.

    Attributes:
        out: The run's folder.
        model: The trained model in it, a native checkpoint.
        steps: Optimiser steps in all.
        tokens: Tokens in all.
        first: The first validation's loss and domains, if there was one.
        last: The last validation's.
        best: The checkpoint that is kept for its lowest held-out loss, and that loss; None if none was measured.
        receipt: Everything that is known about the run, as plain data.
    """

    out: Path
    model: Path
    steps: int
    tokens: int
    first: dict[str, Any] | None
    last: dict[str, Any] | None
    best: tuple[Path, float] | None
    receipt: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "out": str(self.out),
            "model": str(self.model),
            "steps": self.steps,
            "tokens": self.tokens,
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
    progress: ProgressCallback = ignore_progress,
) -> PretrainResult:
    """Train a converted model by a recipe; under torchrun or accelerate launch every process calls it alike.

    ``out`` holds the recipe, ``metrics.jsonl``, checkpoints (each a native checkpoint, with the optimiser's state
    beside it) and, at the end, the trained model in ``model/``.

    Args:
        recipe: Everything that decides the run.
        out: The run's folder.
        resume: Go on from the newest checkpoint in ``out`` (from the start if there is none): weights and metrics end as
            they would have without the stop. Every byte of it is checked first. The name or path of a checkpoint in
            ``out``: go on from that one; later ones are deleted, to be made again.
        extend: Let a resumed run become longer than its checkpoint's (``steps`` or ``tokens``); shares of the length, and
            schedules over it, follow the new length from there on.
        allow_change: Let a resumed run go on with other values of whatever can change within a run; which is written to
            ``metrics.jsonl``.
        force: Delete what an earlier run left in ``out``; what no run wrote stays or is a reason to refuse.
        progress: Told after every step.

    Raises:
        RefusedError: The model is none that can be trained, or another one than the run began with; or ``out`` is, holds
            or lies in what is read, or holds something that the run would write and did not. Nothing was changed.
        CheckpointError: The checkpoint is damaged; an older one that is whole is named.
        UsageError: The recipe does not fit model or data, another run works in ``out``, or ``out`` holds a run.
        LlamaMoeError: The run went wrong: a loss that is not finite, a full disk; the last good checkpoint stays.
        StoppedError: The process got SIGTERM: it ended its step and wrote a checkpoint.
    """
    check_transformers()
    folder = normal_path(out)
    source, parent = locate_folder(recipe.model).path, locate(recipe.parent).path if recipe.parent else None
    check_place(folder, recipe, source, parent)
    config = check_folder(source, allow_dense=recipe.allow_dense)
    facts = identities(recipe, source, parent)
    how: dict[str, Any] = {"resume": resume, "force": force, "extend": extend, "allow_change": allow_change}
    main = int(os.environ.get("RANK", "0")) == 0
    if not main:  # the first process checks, cleans and locks before it joins the others
        return _run(recipe, folder, source, parent, facts, resume, progress)
    refuse_used(folder)
    for sentence in doubts(recipe, config):
        log.warning("%s", sentence)
    check_run_folder(folder, recipe, facts, **how)  # before anything is made, the folder among it
    if recipe.data.verify:
        verify_tokens(recipe, progress)
    with locked(folder):
        checkpoint = check_run_folder(folder, recipe, facts, **how)
        try:
            prepare_run_folder(folder, recipe, checkpoint, force=force)
        except OSError as error:
            raise LlamaMoeError(f"{error.filename or folder} cannot be changed: {error.strerror or error}.") from error
        return _run(recipe, folder, source, parent, facts, resume, progress)


def _run(
    recipe: PretrainRecipe,
    folder: Path,
    source: Path,
    parent: Path | None,
    facts: dict[str, Any],
    resume: bool | str | Path,
    progress: ProgressCallback,
) -> PretrainResult:
    from .build import assemble, choose_device, deterministic
    from .export import export

    started = time.monotonic()
    newest = chosen(folder, resume)
    tracked = same_tracked_run(recipe.trainer.get("report_to"), run_id(folder))
    with deterministic(choose_device(recipe.device)), on_sigterm() as stop, tracked:
        trainer, start = assemble(recipe, folder, source, parent, newest, progress)
        trainer.parts.stop = stop
        _train(trainer, start, folder, facts, newest)
        receipt = _receipt(recipe, start, trainer, started)
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
    )


def _train(trainer: Any, start: dict[str, Any], folder: Path, facts: dict[str, Any], newest: Path | None) -> None:
    """Train to the end; ``start`` gets what the run began with."""
    if newest is None:
        start |= facts
        if trainer.args.should_save:
            write_text(folder / FACTS, json.dumps(start, indent=1) + "\n")
    else:
        start.clear()
        start |= json.loads((folder / FACTS).read_text(encoding="utf-8"))
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def _receipt(recipe: PretrainRecipe, start: dict[str, Any], trainer: Any, started: float) -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "safetensors")
    return {
        "llamamoe": __version__,
        "trained": {
            "version": __version__,
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * recipe.tokens_per_step,
            "recipe_sha256": recipe.sha256(),
        },
        "start": start,
        "mixture": trainer.parts.dynamics.sampler.state_dict(),
        "versions": {name: version(name) for name in packages},
        "run": {"seconds": round(time.monotonic() - started, 1), "device": str(trainer.args.device)},
    }
