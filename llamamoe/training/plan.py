"""Plan a run from headers and recipe; everything that is refused before loading is refused here, too."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.locate import open_parent
from ..checkpoint.out_folder import normal_path
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.tokenizer_ids import beyond_embedding
from ..errors import UsageError
from .changes import Changes
from .corpora import held_out_corpus, training_corpus
from .estimate.compute import DISK_RATE
from .estimate.estimate import Estimate, estimate
from .estimate.hardware import Hardware
from .fit import doubts
from .mixtures.weights import mixture_weights
from .model import check_folder
from .places import find_models
from .preflight import check_place, check_run_folder, identities
from .recipe import PretrainRecipe
from .resuming import changes_since
from .run_folder import refuse_used
from .teacher import teacher_recipe

_MEASURING = 0.3
"""Seconds in which this machine's products are timed."""


@dataclass(frozen=True)
class PretrainPlan:
    """The plan of a run, from headers and recipe alone.

    Attributes:
        model: The converted model's name.
        recipe: The recipe.
        domains: Tokens of each domain, and its share of the mixture.
        held_out: Number of held-out tokens; 0 if there are none.
        measured: Held-out tokens of one validation.
        estimate: Memory, time and disk.
        notes: Settings that are possible but not advisable, and tokens without an embedding.
        teacher: The training of the parent before the run; None if it teaches as it is.
        timed: Operations per second of products on this machine, measured for the estimate of time; None if they were
            given, or are those of another machine.
    """

    model: str
    recipe: PretrainRecipe
    domains: dict[str, tuple[int, float]]
    held_out: int
    measured: int
    estimate: Estimate
    notes: tuple[str, ...] = ()
    teacher: PretrainPlan | None = None
    timed: float | None = None

    @property
    def epochs(self) -> float:
        """Number of passes over the domain with the most passes."""
        wanted = self.estimate.tokens
        return max((wanted * share / tokens for tokens, share in self.domains.values() if tokens), default=0.0)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings before the start of the run."""
        found = [*self.notes, *self.estimate.warnings]
        if self.epochs > 4:
            found.append(
                f"a domain is read {self.epochs:.1f} times: more than about 4 passes over the same text teach little "
                "(arXiv:2305.16264)"
            )
        every, saved = self.recipe.evaluate_every, self.recipe.save_every
        if self.held_out and every is not None and (saved is None or every % saved):
            found.append(
                f"losses are measured every {every} steps, but checkpoints are made every {saved or self.recipe.max_steps}: the best "
                "one that is kept is the best of those that coincide"
            )
        if not self.held_out:
            found.append("no text is held out: the run will not say how good the model gets")
        return tuple(found)

    @property
    def validations(self) -> int:
        """Number of measurements on held-out text, with the start and the end."""
        every, steps = self.recipe.evaluate_every or self.recipe.max_steps, self.recipe.max_steps
        return 1 + math.ceil(steps / every) if self.measured else 0

    @property
    def validation_seconds(self) -> float | None:
        """Seconds of one validation; None where the device's rate is unknown."""
        rate = self.estimate.operations_per_second
        return self.measured * self.estimate.forward_operations / rate if rate else None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return {
            "model": self.model,
            "recipe": self.recipe.model_dump(mode="json"),
            "domains": {name: {"tokens": n, "share": share} for name, (n, share) in self.domains.items()},
            "held_out_tokens": self.held_out,
            "validation_tokens": self.measured,
            "validation_seconds": self.validation_seconds,
            "validations": self.validations,
            "epochs": self.epochs,
            "estimate": self.estimate.to_json(),
            "measured_flops_per_second": self.timed,
            "warnings": list(self.warnings),
            "teacher": None if self.teacher is None else self.teacher.to_json(),
        }


def plan_pretraining(
    recipe: PretrainRecipe,
    *,
    out: str | Path | None = None,
    resume: bool | str | Path = False,
    force: bool = False,
    extend: bool = False,
    allow_change: bool = False,
    world_size: int | None = None,
    device_memory: float | None = None,
    peak_flops: float | None = None,
    bandwidth: float | None = None,
    utilisation: float = 0.4,
    disk_rate: float = DISK_RATE,
) -> PretrainPlan:
    """Check all that `pretrain` checks before loading, except bytes of tokens; estimate memory, time and disk.

    Args:
        recipe: Everything that decides the run.
        out: The run's folder; None: it is not checked.
        resume: See `pretrain`.
        force: See `pretrain`.
        extend: See `pretrain`.
        allow_change: See `pretrain`.
        world_size: Processes, one device each; None: as many as the recipe's sharding needs.
        device_memory: Bytes of a device.
        peak_flops: Operations per second of a device; None: those of this machine, measured in a fraction of a second, if
            one process trains on its CPU or on a GPU that it has.
        bandwidth: Bytes per second that a device reads from and writes to its memory.
        utilisation: Share of the peak that is reached.
        disk_rate: Bytes per second of the file system, of all ranks together.

    Raises:
        RefusedError: The model cannot be trained, the tokens are of another tokenizer, or `pretrain` would
            refuse ``out``.
        UsageError: The recipe does not fit model, tokens or number of processes, or a value for a device is not a
            number above 0.
    """
    from .batches import check_ranks

    world_size = world_size or recipe.distributed.world_size
    timed = _rate_here(recipe) if peak_flops is None and world_size == 1 else None
    peak_flops = timed if peak_flops is None else peak_flops
    hardware = Hardware(world_size, device_memory, peak_flops, bandwidth, utilisation, disk_rate)
    location, parent = find_models(recipe)
    config = check_folder(location.path, allow_dense=recipe.allow_dense)
    facts = identities(recipe, location.path, parent)
    changes = None
    if out is not None:
        folder, how = normal_path(out), {"extend": extend, "allow_change": allow_change}
        check_place(folder, recipe, location.path, parent)
        changes = _changes(folder, recipe, facts, resume=resume, force=force, **how)
    check_ranks(recipe, world_size)
    domains, held_out, measured = _tokens(recipe)
    found = _estimate(recipe, location.path, parent, config, hardware)
    rows = config.get("vocab_size")
    notes = beyond_embedding(location.path, rows, config) if isinstance(rows, int) else []
    told: tuple[str, ...] = (f"the run continues with {changes.describe()}",) if changes else ()
    told = (*doubts(recipe, config), *notes, *told)
    teacher = None if recipe.teacher is None else plan_pretraining(teacher_recipe(recipe), **asdict(hardware))
    return PretrainPlan(location.name, recipe, domains, held_out, measured, found, told, teacher, timed)


def _estimate(
    recipe: PretrainRecipe, source: Path, parent: Path | None, config: dict[str, Any], hardware: Hardware
) -> Estimate:
    """Estimate the run from the headers of both models."""
    dense = open_parent(parent, source) if parent is not None else None
    return estimate(
        recipe,
        config,
        SafetensorsCheckpoint(source).tensors,
        hardware,
        parent_tensors=dense.tensors if dense else None,
        parent_config=dense.config if dense else None,
    )


def _changes(
    folder: Path, recipe: PretrainRecipe, facts: dict[str, Any], *, resume: bool | str | Path, force: bool, **how: bool
) -> Changes | None:
    """Check the folder of a run, and compare the recipe with that of the checkpoint it would continue, if any."""
    refuse_used(folder)
    checkpoint = check_run_folder(folder, recipe, facts, resume=resume, force=force, **how)
    return None if checkpoint is None else changes_since(checkpoint, recipe)


def _rate_here(recipe: PretrainRecipe) -> float | None:
    """Return the operations per second of matrix products on the recipe's device; None if this machine has none."""
    from ..calibration.compute import Compute
    from ..lazy import torch
    from ..models.devices import pick_device

    try:
        device = torch.device(pick_device(recipe.device))
    except UsageError:  # a plan for another machine
        return None
    return Compute(device, getattr(torch, recipe.precision.compute)).flops_per_second(_MEASURING)


def _tokens(recipe: PretrainRecipe) -> tuple[dict[str, tuple[int, float]], int, int]:
    """Return the tokens and share of each domain, the number of held-out tokens, and that of one validation."""
    corpus, held_out = training_corpus(recipe.data), held_out_corpus(recipe.data)
    tokens = {name: corpus.tokens(name) for name in corpus.domains}
    weights = mixture_weights(recipe.data.mixture, tokens)
    there = [held_out.tokens(name) for name in held_out.domains] if held_out is not None else []
    blocks = recipe.data.validation_blocks
    most = max(there, default=0) if blocks is None else blocks * recipe.data.block_length
    shares = {name: (tokens[name], weights[name]) for name in corpus.domains}
    return shares, sum(there), sum(min(each, most) for each in there)
