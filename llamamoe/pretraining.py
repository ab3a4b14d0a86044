"""``llamamoe.pretrain``: train a converted model on, on one core or on a cluster, and go on exactly after a stop."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoint.contents import content_fingerprint
from .checkpoint.reader import SafetensorsCheckpoint
from .checkpoint.writer import write_text
from .errors import CheckpointError, LlamaMoeError, RefusedError, UsageError
from .hub import locate
from .progress import ProgressCallback, ignore_progress
from .training.model import check_folder
from .training.run_folder import FINAL, METRICS, RECIPE, checkpoints, discard_partial, locked, marker, step_of

if TYPE_CHECKING:
    from .training.estimate import Estimate
    from .training.recipe import PretrainRecipe

RECEIPT = "llamamoe_training_receipt.json"
_LEFT = "facts.json"
"""Facts about the start of a run, which a resumed one cannot measure again."""


@dataclass(frozen=True)
class PretrainResult:
    """What a run did.

    Attributes:
        out: The run's folder.
        model: The trained model in it, a native checkpoint.
        steps: Optimiser steps in all.
        tokens: Tokens in all.
        first: The first validation's loss and domains, if there was one.
        last: The last validation's.
        receipt: Everything that is known about the run, as plain data.
    """

    out: Path
    model: Path
    steps: int
    tokens: int
    first: dict[str, Any] | None
    last: dict[str, Any] | None
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
            "receipt": self.receipt,
        }


@dataclass(frozen=True)
class PretrainPlan:
    """What a run would need, from headers and recipe alone.

    Attributes:
        model: The converted model's name.
        recipe: What was asked for.
        domains: Tokens of each domain, and its share of the mixture.
        held_out: Tokens that are held out; 0 if there are none.
        estimate: Memory, time and disk.
    """

    model: str
    recipe: PretrainRecipe
    domains: dict[str, tuple[int, float]]
    held_out: int
    estimate: Estimate

    @property
    def epochs(self) -> float:
        """How often the run goes through the domain that it goes through most often."""
        wanted = self.estimate.tokens
        return max((wanted * share / tokens for tokens, share in self.domains.values() if tokens), default=0.0)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known before the run is started."""
        found = list(self.estimate.warnings)
        if self.epochs > 4:
            found.append(
                f"a domain is read {self.epochs:.1f} times: more than about 4 passes over the same text teach little "
                "(arXiv:2305.16264)"
            )
        if not self.held_out:
            found.append("no text is held out: the run will not say how good the model gets")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "model": self.model,
            "recipe": self.recipe.model_dump(mode="json"),
            "domains": {name: {"tokens": n, "share": share} for name, (n, share) in self.domains.items()},
            "held_out_tokens": self.held_out,
            "epochs": self.epochs,
            "estimate": self.estimate.to_json(),
            "warnings": list(self.warnings),
        }


def plan_pretraining(
    recipe: PretrainRecipe,
    *,
    world_size: int | None = None,
    device_memory: int | None = None,
    peak_flops: float | None = None,
    utilisation: float = 0.4,
) -> PretrainPlan:
    """Check everything that `pretrain` checks before it loads anything, and estimate memory, time and disk.

    Args:
        recipe: Everything that decides the run.
        world_size: Processes, one device each; None: as many as the recipe's sharding needs.
        device_memory: Bytes of a device.
        peak_flops: Operations per second of a device.
        utilisation: The share of them that is reached.

    Raises:
        RefusedError: The model is none that can be trained, or the tokens are another tokenizer's.
        UsageError: The recipe does not fit model, tokens or number of processes.
    """
    from .data.mixtures import mixture_weights
    from .training.batches import check_ranks
    from .training.corpora import held_out_corpus, training_corpus
    from .training.estimate import estimate

    location, parent = locate(recipe.model), locate(recipe.parent).path if recipe.parent else None
    config = check_folder(location.path, allow_dense=recipe.allow_dense)
    _identities(recipe, location.path, parent)
    world_size = world_size or recipe.distributed.fsdp_size * recipe.distributed.tp_size
    check_ranks(recipe, world_size)
    corpus, held_out = training_corpus(recipe.data), held_out_corpus(recipe.data)
    tokens = {name: corpus.tokens(name) for name in corpus.domains}
    weights = mixture_weights(recipe.data.mixture, tokens)
    dense = SafetensorsCheckpoint(parent) if parent is not None else None
    found = estimate(
        recipe,
        config,
        SafetensorsCheckpoint(location.path).tensors,
        parent_tensors=dense.tensors if dense else None,
        parent_config=dense.config if dense else None,
        world_size=world_size,
        device_memory=device_memory,
        peak_flops=peak_flops,
        utilisation=utilisation,
    )
    domains = {name: (tokens[name], weights[name]) for name in corpus.domains}
    measured = sum(held_out.tokens(name) for name in held_out.domains) if held_out is not None else 0
    return PretrainPlan(location.name, recipe, domains, measured, found)


def pretrain(
    recipe: PretrainRecipe,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> PretrainResult:
    """Train a converted model by a recipe; under torchrun or accelerate launch every process calls it alike.

    ``out`` holds the recipe, ``metrics.jsonl``, checkpoints (each a native checkpoint, with the optimiser's state
    beside it) and, at the end, the trained model in ``model/``.

    Args:
        recipe: Everything that decides the run.
        out: The run's folder.
        resume: Go on from the newest whole checkpoint in ``out`` (from the start if there is none): weights and metrics
            end as they would have without the stop.
        force: Drop what an earlier run left in ``out``.
        progress: Told after every step.

    Raises:
        RefusedError: The model is none that can be trained, or another one than the run began with; nothing was changed.
        UsageError: The recipe does not fit model or data, another run works in ``out``, or ``out`` holds a run.
        LlamaMoeError: The run went wrong: a loss that is not finite, a full disk; the last good checkpoint stays.
    """
    folder = Path(out).expanduser()
    source, parent = locate(recipe.model).path, locate(recipe.parent).path if recipe.parent else None
    check_folder(source, allow_dense=recipe.allow_dense)
    facts = _identities(recipe, source, parent)
    main = int(os.environ.get("RANK", "0")) == 0
    if not main:  # the first process checks, cleans and locks before it joins the others
        return _run(recipe, folder, source, parent, facts, resume, progress)
    with locked(folder):
        if recipe.data.verify:
            _verify_tokens(recipe, progress)
        _check_folder(folder, recipe, facts, resume=resume, force=force)
        write_text(folder / RECIPE, recipe.to_yaml())
        return _run(recipe, folder, source, parent, facts, resume, progress)


def _run(
    recipe: PretrainRecipe,
    folder: Path,
    source: Path,
    parent: Path | None,
    facts: dict[str, Any],
    resume: bool,
    progress: ProgressCallback,
) -> PretrainResult:
    from .training.assembly import assemble, choose_device, deterministic

    started = time.monotonic()
    there = checkpoints(folder) if resume else []
    newest = there[-1] if there else None
    with deterministic(choose_device(recipe.device)):
        trainer, start = assemble(recipe, folder, source, parent, newest, progress)
        _train(trainer, start, folder, facts, newest)
        receipt = _receipt(recipe, start, trainer, started)
    model = _export(trainer, folder, source, receipt)
    validations = [line for line in _lines(folder) if line.get("kind") == "validation"]
    return PretrainResult(
        out=folder,
        model=model,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * recipe.tokens_per_step,
        first=validations[0] if validations else None,
        last=validations[-1] if validations else None,
        receipt=receipt,
    )


def _train(trainer: Any, start: dict[str, Any], folder: Path, facts: dict[str, Any], newest: Path | None) -> None:
    """Train to the end; ``start`` gets what the run began with."""
    if newest is None:
        start |= facts
        if trainer.args.should_save:
            write_text(folder / _LEFT, json.dumps(start, indent=1) + "\n")
    else:
        start.clear()
        start |= json.loads((folder / _LEFT).read_text(encoding="utf-8"))
    trainer.parts.metrics.resume(step_of(newest) if newest else -1)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def _lines(folder: Path) -> list[dict[str, Any]]:
    from .training.metrics import read_lines

    return read_lines(folder / METRICS) if (folder / METRICS).exists() else []


# ---- before anything is loaded ------------------------------------------------------------------------------------


def _identities(recipe: PretrainRecipe, source: Path, parent: Path | None) -> dict[str, Any]:
    """What the run is made from: fingerprints of model, parent and tokens, checked against each other."""
    from .training.corpora import held_out_corpus, training_corpus

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
    return found


def _verify_tokens(recipe: PretrainRecipe, progress: ProgressCallback) -> None:
    """Are the tokens still those that were made?"""
    from .training.corpora import held_out_corpus, training_corpus

    for corpus in (training_corpus(recipe.data), held_out_corpus(recipe.data)):
        if corpus is not None:
            corpus.verify(progress)


def _check_folder(folder: Path, recipe: PretrainRecipe, facts: dict[str, Any], *, resume: bool, force: bool) -> None:
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
                hint=f"The run's own recipe is {folder / RECIPE}; to train on differently, give model={there[-1]} and "
                "another --out.",
            )
        before = json.loads((folder / _LEFT).read_text(encoding="utf-8"))
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
    for name in (METRICS, RECIPE, RECEIPT, _LEFT):
        (folder / name).unlink(missing_ok=True)


# ---- the trained model --------------------------------------------------------------------------------------------


def _export(trainer: Any, folder: Path, source: Path, receipt: dict[str, Any]) -> Path:
    """Write ``model/``: native, in the dtype that was asked for, whole or not at all."""
    import torch
    from safetensors import SafetensorError

    from .streaming import quiet_transformers
    from .training.model import finish_folder

    final, partial = folder / FINAL, folder / f"{FINAL}.partial"
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    name = trainer.parts.recipe.precision.save or SafetensorsCheckpoint(source).config.get("torch_dtype") or "bfloat16"
    trainer.parts.dynamics.gate.detach()
    together = trainer.is_distributed_loading_by_transformers  # then every rank has a part of the weights
    if not together:
        model = model.to(getattr(torch, str(name).removeprefix("torch.")))
    try:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        if together or trainer.args.should_save:
            with quiet_transformers():
                model.save_pretrained(partial, is_main_process=trainer.args.should_save)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            finish_folder(partial, source, {"trained": receipt["trained"]})
            write_text(partial / RECIPE, trainer.parts.recipe.to_yaml())
            write_text(partial / RECEIPT, json.dumps(receipt, indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise LlamaMoeError(
            f"{final} cannot be written: {getattr(error, 'strerror', None) or error}.",
            hint="Make room, then go on with --resume: only this is done again.",
        ) from error
    trainer.accelerator.wait_for_everyone()
    return final


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
