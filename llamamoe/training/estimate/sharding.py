"""The sharding of weights over ranks, and the trained groups, for `llamamoe.training.estimate.estimate`."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import PretrainRecipe
from .shapes import LayerShape, ModelShape


@dataclass(frozen=True)
class Sharding:
    """The numbers of ranks over which weights are sharded.

    Attributes:
        fsdp_size: Ranks of FSDP2.
        ep_size: Ranks of expert parallelism, which are among those of fsdp_size.
    """

    fsdp_size: int = 1
    ep_size: int = 1

    def computed(self, group: str) -> int:
        """Return the factor by which the group's weights are sharded in computation."""
        return self.ep_size if group == "experts" else 1

    @property
    def cut(self) -> bool:
        """True if anything is sharded."""
        return self.fsdp_size > 1


def trained_groups(recipe: PretrainRecipe, shape: ModelShape) -> frozenset[str]:
    """Return the groups whose weights are trained; with LoRA only routers, if the recipe requests it."""
    groups = frozenset(shape.by_group()) - frozenset(recipe.freeze)
    if recipe.lora is None:
        return groups
    return groups & frozenset({"router"} if recipe.lora.train_router else ())


def moment_bytes(recipe: PretrainRecipe, weights: int, adapters: int) -> int:
    """Return the bytes of AdamW's two moments.

    Args:
        recipe: The recipe of the run.
        weights: Number of trained weights.
        adapters: Number of adapters' weights, which peft keeps in float32.
    """
    widths = {"float32": 4, "bfloat16": 2}
    stored = widths[recipe.precision.parameters]
    of_weights, of_adapters = (widths.get(recipe.precision.moments or "", width) for width in (stored, 4))
    return 2 * (weights * of_weights + adapters * of_adapters)


def adapters(recipe: PretrainRecipe, shape: ModelShape, layer: LayerShape) -> int:
    """Return LoRA's parameters in a layer: ``r (in + out)`` per module of attention; ``N r (3H + 3W)`` of experts."""
    if recipe.lora is None:
        return 0
    rank = recipe.lora.rank
    found = sum(rank * sum(size) for name, size in layer.projections.items() if name in recipe.lora.attention)
    if recipe.lora.experts and layer.expert_width:
        found += shape.num_experts * rank * 3 * (shape.hidden_size + layer.expert_width)
    return found
