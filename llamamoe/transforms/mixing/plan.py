"""Plan a mix from headers and a recipe alone: models, target, names, costs, warnings, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...architectures.dense_checkpoint import DenseModel, mixture_key, understand
from ...architectures.expert_weighting import routes_attention
from ...architectures.sources.base import canonical_shapes
from ...checkpoint.locate import Location, locate_folder
from ...checkpoint.out_folder import normal_path
from ...checkpoint.reader import SafetensorsCheckpoint
from ...conversion.plan import SplitPlan, plan_split
from ...conversion.preflight import check_disk
from ...conversion.recipe import SplitRecipe, build_recipe
from ...errors import CheckpointError, RefusedError
from ..rewrite import check_place, same_tensors
from .checkpoints import AveragedCheckpoint
from .checks import check_shapes, check_vocabularies, setting_warnings
from .exactness import mix_exactness, rest_of
from .expert_texts import alike_warnings, text_files
from .prompts import Prompts, read_prompts
from .recipe import MixRecipe


@dataclass(frozen=True)
class MixPlan:
    """The plan of a mix, which `llamamoe.mix` executes.

    Attributes:
        recipe: The recipe with target and dtype chosen.
        places: BASE and the models of the experts, as they were found.
        models: The same, opened.
        layout: The plan of BASE with copies of its FFN as experts, which has the same tensors; its model gives the rest.
        warnings: Sentences for the user.
        prompts: The prompts of the router ``hidden``.
    """

    recipe: MixRecipe
    places: tuple[Location, ...]
    models: tuple[DenseModel, ...]
    layout: SplitPlan
    warnings: tuple[str, ...]
    prompts: Prompts | None = None

    @property
    def base(self) -> DenseModel:
        """The model that gives all but the FFNs."""
        return self.models[0]

    @property
    def experts(self) -> tuple[DenseModel, ...]:
        """The models that give the FFNs."""
        return self.models[1:]

    @property
    def exactness(self) -> str:
        """A sentence on what the output equals."""
        return mix_exactness(self.rest)

    @property
    def peak_bytes(self) -> int:
        """An estimate of the peak memory: one FFN, or the states of all texts in one layer, twice, and that layer."""
        texts = len(self.recipe.texts or ()) * self.recipe.text_tokens
        return self.layout.peak_bytes + 2 * 4 * texts * self.base.spec.hidden_size

    @property
    def rest(self) -> str:
        """Words for what gives attention, norms, embedding and head."""
        return rest_of(self.recipe.backbone)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data, the same for every run."""
        plan = self.layout
        return {
            "llamamoe": __version__,
            "base": self.places[0].name,
            "experts": [place.name for place in self.places[1:]],
            "family": self.base.source.name,
            "target": plan.target.name,
            "transformers": list(plan.majors),
            "exactness": self.exactness,
            "num_experts": plan.layout.num_experts,
            "top_k": plan.layout.top_k,
            "expert_width": plan.layout.expert_width,
            "padding_per_layer": plan.padding_per_layer,
            "dtype": plan.dtype,
            "parent": plan.parent_cost.to_json(),
            "converted": plan.cost.to_json(),
            "shards": {file: sum(n for _, _, n in tensors.values()) for file, tensors in plan.shards.items()},
            "num_tensors": len(plan.tensors),
            "peak_memory_bytes": self.peak_bytes,
            "warnings": list(self.warnings),
            "recipe": self.recipe.model_dump(mode="json"),
        }


def plan_mix(base: str | Path, recipe: MixRecipe) -> MixPlan:
    """Plan a mix, reading headers only and writing nothing. For the arguments see `mix`.

    Raises:
        CheckpointError: A model is not a dense checkpoint of a known family.
        UsageError: The prompts are invalid, or a text does not exist or is too short.
        RefusedError: The models do not fit together, or no target can hold them; the message names every reason.
    """
    if routes_attention(recipe.target):
        raise RefusedError(
            f"{recipe.target} routes attention with as many experts as FFNs, but the experts of a mix are FFNs of models that share one attention.",
            hint="Give another --target, or omit it.",
        )
    places = tuple(locate_folder(source) for source in (base, *recipe.experts))
    models = tuple(_opened(place, index) for index, place in enumerate(places))
    check_shapes(models)
    check_vocabularies(models)
    layout = plan_split(models[0], layout_recipe(recipe))
    layout = replace(layout, model=_backbone(models, recipe))
    chosen = recipe.model_copy(update={"target": layout.recipe.target, "dtype": layout.recipe.dtype})
    warnings = (*layout.warnings, *_rounding(models, layout.dtype), *setting_warnings(models))
    prompts = None if recipe.prompts is None else read_prompts(recipe.prompts, recipe.experts)
    directions = [] if prompts is None else [each.direction for each in prompts.experts]
    warnings = (*warnings, *alike_warnings(directions, "prompts"), *alike_warnings(text_files(recipe), "texts"))
    return MixPlan(chosen, places, models, layout, tuple(dict.fromkeys(warnings)), prompts)


def _opened(place: Location, index: int) -> DenseModel:
    """Open BASE (index 0) or the model of an expert.

    Raises:
        CheckpointError: It is not a dense checkpoint of a known family; the message names the argument and the path.
    """
    checkpoint = SafetensorsCheckpoint(place.path)
    try:
        return understand(checkpoint)
    except CheckpointError as error:
        which = f"expert {index - 1} (--expert {place.path})" if index else f"BASE ({place.path})"
        wanted = "was trained from BASE" if index else "all experts were trained from"
        hint: str | None = f"Give the dense language model that {wanted}, in a folder of its own."
        if mixture_key(checkpoint.config) is None:  # what a mixture could be given to is of no use here
            hint = f"{hint} {error.hint}" if "text_config" in checkpoint.config else error.hint
        raise CheckpointError(f"{which}: {error.message}", hint=hint) from None


def _backbone(models: Sequence[DenseModel], recipe: MixRecipe) -> DenseModel:
    """Return BASE, or BASE with the average of the models' weights.

    Raises:
        RefusedError: The models do not have the same tensors.
    """
    if recipe.backbone == "base":
        return models[0]
    used = [(_folder(model), share) for model, share in zip(models, recipe.shares, strict=True) if share]
    checkpoints = [checkpoint for checkpoint, _ in used]
    reasons = same_tensors([_folder(models[0]), *checkpoints])
    if reasons:
        raise RefusedError(
            "the backbone cannot be averaged: " + "; ".join(reasons[:3]) + ".",
            hint="Leave the backbone at base, or save the models in the same way.",
        )
    return replace(
        models[0], checkpoint=AveragedCheckpoint(models[0].checkpoint, checkpoints, [share for _, share in used])
    )


def _folder(model: DenseModel) -> SafetensorsCheckpoint:
    assert isinstance(model.checkpoint, SafetensorsCheckpoint), "plan_mix opens folders"
    return model.checkpoint


def check_mix_place(plan: MixPlan, out: str | Path, *, resume: bool, force: bool) -> None:
    """Refuse an OUT that would harm existing files, or a disk with too little room.

    Raises:
        RefusedError: It would, or there is too little.
    """
    place = normal_path(out)
    names = ("BASE", *(f"expert {index}" for index in range(len(plan.experts))))
    check_place(place, [each.path for each in plan.places], resume=resume, force=force, names=names)
    check_disk(place, plan.layout, reuse=resume or force)


def layout_recipe(recipe: MixRecipe, num_models: int | None = None, top_k: int | None = None) -> SplitRecipe:
    """Return the recipe that splits BASE into a mixture with the tensors of a mix: copies of its FFN.

    Args:
        recipe: The recipe of the mix.
        num_models: Number of models; None: the recipe's.
        top_k: Models selected per token; None: the recipe's.
    """
    return build_recipe(
        {
            "num_experts": num_models or len(recipe.experts),
            "top_k": top_k or recipe.top_k,
            "method": "upcycle",
            "shared": 0,
            "router": {"name": "random", "std": recipe.router_std},
            "router_scale": "soft",
            "target": recipe.target,
            "dtype": recipe.dtype,
            "seed": recipe.seed,
            "shard_size": recipe.shard_size,
        }
    )


def _rounding(models: Sequence[DenseModel], dtype: str) -> list[str]:
    """Return a warning for each expert whose FFNs are rounded."""
    found = []
    for model in models[1:]:
        kinds = {model.dtype_of(name) for name in canonical_shapes(model.spec) if ".mlp." in name}
        lossy = sorted(kind for kind in kinds if kind != dtype and dtype != "F32")
        if lossy:
            found.append(f"the FFNs of {model.checkpoint.path} are stored as {', '.join(lossy)}: rounded to {dtype}")
    return found
