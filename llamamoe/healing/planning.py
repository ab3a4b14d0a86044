"""From headers and recipe to a plan; everything that is refused for their sake is refused here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures.dense_checkpoint import DenseModel, refuse_foreign, understand
from ..architectures.expert_weighting import mixing_of
from ..architectures.targets import TARGETS
from ..architectures.targets.base import Target
from ..calibration.compute import MAX_LENGTH
from ..checkpoint.base import FLOAT_DTYPES
from ..checkpoint.locate import locate, locate_folder, open_parent
from ..checkpoint.reader import SafetensorsCheckpoint
from ..data.files import find_files
from ..errors import CheckpointError, RefusedError, UsageError
from ..methods.routers import ROUTERS
from ..models.loadable import check_counts
from .plan import ROUTER, HealPlan

if TYPE_CHECKING:
    from .recipe import HealRecipe

_IN_MEMORY = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
"""How transformers 5 names experts in memory; no architecture here names them so in files."""


def plan_heal(model: str | Path, parent: str | Path, recipe: HealRecipe) -> HealPlan:
    """What `heal` would do; reads headers only and writes nothing. For the arguments see `llamamoe.heal`.

    Raises:
        RefusedError: One of the two is not what it must be, or they do not belong together; every reason is named.
        UsageError: The text is not there, or the recipe does not suit the models.
    """
    place, origin = locate_folder(model), locate(parent)
    checkpoint = SafetensorsCheckpoint(place.path)
    target = _target(checkpoint)
    check_counts(checkpoint.config, checkpoint.tensors)
    dense = understand(open_parent(origin.path, place.path))
    layers = tuple(sorted(int(found[1]) for name in checkpoint.tensors if (found := ROUTER.match(name))))
    _check_fit(checkpoint, dense, layers)
    find_files(recipe.text)
    recipe = recipe.model_copy(update={"router": _router(recipe, checkpoint)})
    length = _length(recipe, dense)
    plan = HealPlan(place, checkpoint, origin, dense, target, recipe, layers, length)
    _check_dtypes(plan)
    return replace(plan, warnings=tuple(_warnings(plan)))


def _target(checkpoint: SafetensorsCheckpoint) -> Target:
    config = checkpoint.config
    refuse_foreign(checkpoint)
    name = config.get("model_type")
    known = [each.name for each in TARGETS if each.routed]
    if name not in known:
        raise CheckpointError(
            f"MODEL: model_type {name!r} is not a mixture of experts that can be healed.",
            hint=f"Convert the dense model first (llamamoe split). Known: {', '.join(known)}.",
        )
    fused = next((n for n in checkpoint.tensors if _IN_MEMORY.search(n)), None)
    if fused is not None:
        raise CheckpointError(
            f"MODEL's weights have the names that transformers 5 uses in memory ({fused}).",
            hint="Load the folder with transformers 5 and save it again without save_original_format=False.",
        )
    return mixing_of(config).target


def _check_fit(checkpoint: SafetensorsCheckpoint, dense: DenseModel, layers: tuple[int, ...]) -> None:
    """Refuse two checkpoints of different sizes, with every difference."""
    config, spec = checkpoint.config, dense.spec
    wanted = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "vocab_size": spec.vocab_size,
        "num_attention_heads": spec.num_heads,
    }
    wrong = [f"{key} is {config.get(key)} and {value}" for key, value in wanted.items() if config.get(key) != value]
    if wrong:
        raise RefusedError(
            f"MODEL was not made from this parent: {'; '.join(wrong)}.", hint="Give its own parent with --parent."
        )
    if not layers or layers[-1] >= spec.num_layers:
        raise CheckpointError("MODEL's files hold no routers where its architecture has them.")


def _check_dtypes(plan: HealPlan) -> None:
    for name in plan.trained_names(plan.layers[0]):
        if plan.checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"MODEL: {name} is stored as {plan.checkpoint.tensors[name].dtype}, which cannot be trained.",
                hint="Heal the checkpoint before it is quantised.",
            )


def _router(recipe: HealRecipe, checkpoint: SafetensorsCheckpoint) -> str:
    """What ``auto`` means: a router that was fitted on text chooses well, and training it by gradient only spoils that.

    Random and unknown routers have all to learn, and soft ones were trained already.
    """
    if recipe.router != "auto":
        return recipe.router
    block = checkpoint.config.get("llamamoe")
    block = block if isinstance(block, dict) else {}
    name = str(block.get("router"))
    fitted = name in ROUTERS and ROUTERS.get(name).needs == "activations" and block.get("router_scale") == "hard"
    return "frozen" if fitted and not recipe.losses and not recipe.competitive_epochs else "trained"


def _length(recipe: HealRecipe, dense: DenseModel) -> int:
    positions = dense.spec.max_position_embeddings
    if recipe.length is not None and recipe.length > positions:
        raise UsageError(f"length is {recipe.length}, but the parent has only {positions} positions.")
    return min(recipe.length or min(MAX_LENGTH, positions), recipe.tokens // 2)


def _warnings(plan: HealPlan) -> Iterator[str]:
    if plan.recipe.tokens < 16 * plan.recipe.batch:
        yield f"{plan.recipe.tokens} tokens are {plan.steps} steps a layer: more --tokens, more epochs or a smaller batch"
