"""Settings of a run that do not apply to models whose attention is routed, too."""

from __future__ import annotations

from collections.abc import Iterator

from .losses import LOSSES
from .recipe import PretrainRecipe


def contradictions(recipe: PretrainRecipe, model_type: str) -> Iterator[str]:
    """Yield the settings that cannot be used, with the reason and the way out."""
    if recipe.gradient_checkpointing:
        yield f"gradient_checkpointing: the class of {model_type} in transformers cannot recompute its layers (false)"
    if recipe.distributed.sharded:
        yield f"distributed: the class of {model_type} in transformers has no plan for sharding (data-parallel runs: leave it out)"
    if recipe.experts_implementation is not None:
        yield f"experts_implementation: the class of {model_type} in transformers has one of its own only (null)"
    if recipe.lora is not None:
        yield (
            f"lora adapts q_proj and its like, and experts in two tensors (gate_up_proj, down_proj), neither of which {model_type} "
            "has (train all weights, or some groups of them: freeze)"
        )
    compared = [f"distill.{name}" for name in ("ffn", "hidden") if recipe.distill and getattr(recipe.distill, name)]
    compared += [f"the loss {each.name}" for each in recipe.losses if LOSSES.get(each.name).needs_targets]
    for term in compared:
        yield (
            f"{term} compares layers with the parent's, but the residual stream of {model_type} has another scale, which its "
            "norms' epsilon requires (distill.kl compares predictions)"
        )
