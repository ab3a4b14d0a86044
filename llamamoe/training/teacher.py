"""Teacher correction: train the dense parent on the text before the converted model is distilled from it.

A parent that does not know the text, or its separators, pulls the student away from what the text teaches. Trained on
it briefly, it is a better teacher than before, with a constant weight until the end.

Reference: Sreenivas et al., "LLM Pruning and Distillation in Practice: The Minitron Approach" (arXiv:2408.11796).
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from ..checkpoint.out_folder import TRAINED
from ..errors import RefusedError
from .changes import Changes
from .ownership import (
    RECIPE,
    TEACHER,
    close_staging,
    discard,
    manifest_of,
    named_checkpoints,
    open_staging,
    run_id,
)
from .recipe import PretrainRecipe

_OF_MIXTURES = ("router", "experts", "shared")
"""Groups of parameters that a dense model does not have."""
_OF_TRACKERS = ("report_to", "run_name", "project")
"""Keys of the Trainer by which a tracker would take both runs for one."""


def teacher_recipe(recipe: PretrainRecipe) -> PretrainRecipe:
    """Return the recipe of the parent's training: the same text, batches and optimiser, without anything of experts.

    Args:
        recipe: The run's recipe, with `teacher` and `parent`.
    """
    assert recipe.teacher is not None
    given = recipe.model_dump(exclude={"steps", "parent", "gate", "losses", "balancing", "distill", "teacher", "lora"})
    given |= {
        "model": recipe.parent,
        "tokens": recipe.teacher.tokens,
        "allow_dense": True,
        "stop_on_collapse": False,
        "experts_implementation": None,
        "keep": 1,
    }
    given["optimizer"] |= {"lr": recipe.teacher.lr or recipe.optimizer.lr, "router_lr": None, "experts_lr": None}
    given["optimizer"]["down_lr_factor"] = None
    given["router"] = {}
    given["data"] |= {"update": "static", "reference_losses": None}
    given["distributed"]["ep_size"] = 1
    given["precision"]["save"] = recipe.precision.parent  # the dtype in which it is loaded to teach
    given["freeze"] = [group for group in recipe.freeze if group not in _OF_MIXTURES]
    given["trainer"] = {key: value for key, value in recipe.trainer.items() if key not in _OF_TRACKERS}
    return PretrainRecipe.load(given=given)


def finished_teacher(out: Path) -> Path | None:
    """Return the model of a finished training of the parent, in the folder of its run; None if it is not finished."""
    model = out / TEACHER / TRAINED
    return model if model.exists() else None


def check_teacher(recipe: PretrainRecipe, out: Path) -> None:
    """Refuse a finished training of the parent that is damaged or of another recipe. Reads all of its model.

    Args:
        recipe: The run's recipe.
        out: The run's folder.

    Raises:
        RefusedError: It is, or the run did not write it.
        CheckpointError: Its list of files is missing or damaged.
    """
    folder, model = out / TEACHER, finished_teacher(out)
    if model is None:
        return
    found = manifest_of(model, run_id(folder))
    way = f"Delete {folder} to train the teacher again, or give another --out."
    if fault := next(chain(found.misfits(model), found.changes(model)), None):
        raise RefusedError(f"the trained parent {model} is damaged: {fault}.", hint=way)
    before, now = PretrainRecipe.load(folder / RECIPE), teacher_recipe(recipe)
    if not named_checkpoints(out) and (changes := Changes.between(before, now, now.max_steps)):
        raise RefusedError(f"the parent in {model} was trained by another recipe: {changes}.", hint=way)


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished training, which nothing resumes from any more."""
    open_staging(folder)
    for path in named_checkpoints(folder):
        discard(folder, path)
    close_staging(folder)
