"""Choose the checkpoint from which a run resumes, and check that it is unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from ..checkpoint.manifest import FileEntry, Manifest, file_sha256
from ..checkpoint.reader import INDEX, SINGLE, read_weight_map
from ..errors import CheckpointError, LlamaMoeError, RefusedError, UsageError
from ..lazy import safetensors
from ..recipes import validated
from .changes import Changes
from .ownership import FACTS, MARKER, METRICS, RECIPE, manifest_of, named_checkpoints, run_id, step_of
from .recipe import PretrainRecipe
from .run_folder import checkpoints, complete, start_anew

log = logging.getLogger("llamamoe")
STATE, REST = "llamamoe_training.json", "llamamoe_trained.safetensors"
"""The state of mixture and gate; the weights trained beside adapters."""
TRAINER_STATE = "trainer_state.json"
OPTIMIZER, SCHEDULE = "optimizer", "schedule.json"
"""The folder of the optimiser's state and the random numbers of all ranks; the state of the schedule."""
_FORMER = ("optimizer.pt", "optimizer-00000.safetensors")
"""Files in which earlier versions kept the optimiser's state."""


def optimizer_file(rank: int) -> str:
    """Return the name of a rank's part of the optimiser's state."""
    return f"{OPTIMIZER}/rank-{rank:05d}.safetensors"


def by_deepspeed(recipe: PretrainRecipe) -> bool:
    """Return whether DeepSpeed saves the run's state, in its own files."""
    return recipe.trainer.get("deepspeed") is not None


def chosen(folder: Path, resume: bool | str | Path) -> Path | None:
    """Return the requested checkpoint, by name or path, or the latest one; None at a run's start.

    Raises:
        UsageError: The folder has no checkpoint of that name.
    """
    if isinstance(resume, bool):
        return next(reversed(named_checkpoints(folder)), None) if resume else None
    given = Path(resume).expanduser()
    found = folder / given.name
    elsewhere = len(given.parts) > 1 and given.resolve() != found.resolve()
    if elsewhere or found not in named_checkpoints(folder):
        there = ", ".join(path.name for path in named_checkpoints(folder)) or "none"
        raise UsageError(f"{resume} is not a checkpoint of the run in {folder}.", hint=f"Its checkpoints: {there}.")
    return found


def changes_since(checkpoint: Path, recipe: PretrainRecipe) -> Changes:
    """Compare a recipe with the one that a checkpoint was made by.

    Raises:
        RefusedError: The checkpoint was not written by its folder's run.
        UsageError: Its recipe has keys that this version has not.
    """
    folder = checkpoint.parent
    written = manifest_of(checkpoint, run_id(folder)).facts.get("recipe")
    # Checkpoints of earlier versions do not hold it.
    before = PretrainRecipe.load(folder / RECIPE) if written is None else validated(PretrainRecipe, written)
    return Changes.between(before, recipe, step_of(checkpoint))


def check_same_run(checkpoint: Path, recipe: PretrainRecipe, *, extend: bool, allow_change: bool) -> None:
    """Refuse to resume with a recipe that gives other weights, unless the change is allowed.

    Raises:
        RefusedError: The checkpoint was made by another recipe; the message names every key.
    """
    anew = start_anew(recipe, checkpoint, step_of(checkpoint))
    _refuse_former(checkpoint, recipe, anew)
    changes = changes_since(checkpoint, recipe)
    changes.check(str(checkpoint), anew, extend=extend, allow_change=allow_change)
    if changes and "recipe" not in manifest_of(checkpoint, run_id(checkpoint.parent)).facts:
        raise RefusedError(
            f"{checkpoint} was written by an earlier version of llamamoe, without its recipe: {changes} cannot be applied to it.",
            hint=f"Resume with {checkpoint.parent / RECIPE} up to the next checkpoint first; or start {anew}.",
        )


def _refuse_former(checkpoint: Path, recipe: PretrainRecipe, anew: str) -> None:
    files = manifest_of(checkpoint, run_id(checkpoint.parent)).files
    former = next((name for name in _FORMER if name in files), None)
    if former is not None and not by_deepspeed(recipe):
        raise RefusedError(
            f"{checkpoint} was written by an earlier version of llamamoe: this one does not read the optimiser's state in {former}.",
            hint=f"Go on with that version; or start {anew}, with new moments.",
        )


def check_contents(checkpoint: Path, recipe: PretrainRecipe) -> None:
    """Refuse a checkpoint that differs in any byte from what the run wrote. Reads all of it.

    Raises:
        CheckpointError: The checkpoint is damaged; the message names file and fault, and an older intact checkpoint.
    """
    fault = next(faults(checkpoint, recipe), None)
    if fault is None:
        return
    older = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    whole = next((path for path in reversed(older) if next(faults(path, recipe), None) is None), None)
    way = "No older checkpoint is whole: put the file back from a copy, or begin again in another --out or by --force."
    if whole is not None:
        way = f"--resume {whole.name} goes on from the newest older one that is whole; later ones are deleted and made again."
    raise CheckpointError(f"{checkpoint} is damaged: {fault}.", hint=way)


def note_files(
    checkpoint: Path,
    folder: Path,
    recipe: PretrainRecipe,
    *,
    step: int,
    ranks: int,
    written: Mapping[str, FileEntry],
    metrics: Mapping[str, Any],
) -> None:
    """Write the manifest of a checkpoint whose files all ranks have written; it is not yet in its final place.

    Args:
        checkpoint: The folder in which it was assembled.
        folder: The run's folder.
        recipe: The run's recipe.
        step: Finished steps.
        ranks: Processes of the run.
        written: Entries of files that ranks have synced and hashed.
        metrics: The `metrics_facts` at the step.

    Raises:
        OSError: A file that a resume needs was not written, or the disk is full.
    """
    facts = {
        "run": run_id(folder),
        "step": step,
        "ranks": ranks,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.sha256(),
        "facts_sha256": file_sha256(folder / FACTS),
        "metrics": dict(metrics),
    }
    lacking = next(missing(checkpoint, complete(checkpoint, facts, written), recipe), None)
    if lacking is not None:
        raise OSError(f"{lacking} was not written")


@contextmanager
def state_errors(checkpoint: str | None) -> Iterator[None]:
    """Report a state that is refused or does not fit as a `CheckpointError`.

    Hashes tell what changed, not who wrote the manifest. Transformers reads the ``.pt`` files of a run by DeepSpeed with
    ``weights_only=True``.
    """
    try:
        yield
    except UnpicklingError as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{checkpoint} holds a .pt file with something else than tensors, which could run code: refused ({reason}).",
            hint="It was not written by this run: go on from another checkpoint, --resume CHECKPOINT.",
        ) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError, safetensors.SafetensorError) as error:
        if checkpoint is None or isinstance(error, LlamaMoeError):
            raise
        raise CheckpointError(
            f"{checkpoint} holds a state that does not fit this run ({type(error).__name__}: {error}).",
            hint="It was not written by this run: go on from another checkpoint, --resume CHECKPOINT.",
        ) from error


def metrics_facts(folder: Path, nbytes: int | None = None) -> dict[str, Any]:
    """Return size and SHA-256 of the lines of metrics, or of their first ``nbytes``, for a checkpoint's manifest."""
    path = folder / METRICS
    data = path.read_bytes()[:nbytes] if path.exists() else b""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def warn_of_metrics(checkpoint: Path) -> None:
    """Warn if the lines of metrics changed since the checkpoint was written.

    They do not affect the weights, so that a run whose metrics were lost can resume.
    """
    before = manifest_of(checkpoint, run_id(checkpoint.parent)).facts.get("metrics")
    nbytes = before.get("bytes") if isinstance(before, dict) else None
    if type(nbytes) is not int or metrics_facts(checkpoint.parent, nbytes) != before:
        log.warning(
            "%s is not what it was when %s was written: its lines stay as they are, and the best checkpoint is chosen by "
            "them",
            checkpoint.parent / METRICS,
            checkpoint.name,
        )


def faults(checkpoint: Path, recipe: PretrainRecipe) -> Iterator[str]:
    """Yield a phrase for each fault of a checkpoint, with those that are quick to find first."""
    try:
        manifest = manifest_of(checkpoint, run_id(checkpoint.parent))
    except RefusedError as error:
        yield error.message.removesuffix(".")
        return
    step = manifest.facts.get("step")
    if step != step_of(checkpoint):
        yield f"{MARKER} says step {step!r}"
    yield from manifest.misfits(checkpoint)
    for name in missing(checkpoint, manifest, recipe):
        yield f"{name} is not among its files"
    yield from _state_faults(checkpoint)
    yield from manifest.changes(checkpoint)
    if manifest.facts.get("facts_sha256") != file_sha256(checkpoint.parent / FACTS):
        yield f"{FACTS} of the run was changed after it was written"


def _state_faults(checkpoint: Path) -> Iterator[str]:
    step = None
    for name in (STATE, TRAINER_STATE):  # the latter grows with the run, so its size is not bounded
        try:
            data = json.loads((checkpoint / name).read_bytes())
            step = data.get("global_step")
        except (OSError, ValueError, RecursionError, AttributeError):
            yield f"{name} is not valid JSON"
            return
    if type(step) is not int or step != step_of(checkpoint):
        yield f"{TRAINER_STATE} says step {step!r}"


def missing(checkpoint: Path, manifest: Manifest, recipe: PretrainRecipe) -> Iterator[str]:
    """Yield files that a resume needs and the manifest lacks: weights, optimiser, schedule, random states, state."""
    ranks = manifest.facts.get("ranks")
    if type(ranks) is not int or ranks < 1:
        yield f"{MARKER}: a number of ranks"
        return
    wanted = [TRAINER_STATE, STATE, *_weights(checkpoint, recipe)]
    if by_deepspeed(recipe):
        wanted += [*_deepspeed(manifest.files)]
        wanted += ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    else:
        wanted += [SCHEDULE, *map(optimizer_file, range(ranks))]
    yield from (name for name in wanted if name not in manifest.files)


def _weights(checkpoint: Path, recipe: PretrainRecipe) -> Iterator[str]:
    if recipe.lora is not None:
        yield from ("adapter_config.json", "adapter_model.safetensors", REST)
        return
    yield "config.json"
    if not (checkpoint / INDEX).is_file():
        yield SINGLE
        return
    yield INDEX
    try:
        yield from sorted(set(read_weight_map(checkpoint / INDEX).values()))
    except LlamaMoeError:
        yield f"{INDEX}: a map of weights"


def _deepspeed(names: Collection[str]) -> Iterator[str]:
    """Yield missing files of DeepSpeed, which writes its own folders, whose names depend on its stage."""
    yield "latest"
    if not any(re.fullmatch(r"global_step\d+/.*_states\.pt", name) for name in names):
        yield "global_step*/*_states.pt"
