"""Add low-rank adapters by peft, experts included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.files import save_tensors
from ..lazy import peft, require, safetensors, torch
from .moe_layers import CORRECTION_BIAS
from .recipe_parts import LoraRecipe
from .resuming import REST


def add_adapters(model: Any, recipe: LoraRecipe) -> Any:
    """Wrap the model: its weights are frozen, adapters (and routers, if the recipe requests it) are trained.

    Experts are three-dimensional parameters, which peft reaches as ``target_parameters``, not as modules.

    Raises:
        MissingExtraError: peft is not installed.
    """
    require("peft", "train", "lora")
    make: Any = peft.LoraConfig  # its types are narrower than its actual arguments
    names = [name for name, _ in model.named_parameters()]
    experts = sorted({name.split("layers.")[1].split(".", 1)[1] for name in names if ".experts." in name})
    config = make(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.attention),
        target_parameters=[name for name in experts if name.endswith("_proj")] if recipe.experts else None,
    )
    routers = [name for name, p in model.named_parameters() if p.requires_grad and _is_router(name)]
    wrapped = peft.get_peft_model(model, config)
    if recipe.train_router:
        for name, parameter in wrapped.get_base_model().named_parameters():
            if name in routers:
                parameter.requires_grad_(True)
    return wrapped


def _is_router(name: str) -> bool:
    from .parameters import group_of

    return group_of(name) == "router"


def merge_adapters(model: Any) -> Any:
    """Add the adapters to the weights, in place, and return the model without them.

    Weights that FSDP2 shards get their part of each product, which every rank computes whole, a layer at a time.
    """
    from .ranks import cut_like

    def cut(whole: Any, weight: Any) -> Any:
        return lambda name: cut_like(whole(name), weight)

    for module in model.modules():
        if (weight := _adapted(module)) is not None:
            module.get_delta_weight = cut(module.get_delta_weight, weight)
    return model.merge_and_unload()


def _adapted(module: Any) -> Any:
    """Return the weight to which a module of peft adds a product; None for other modules."""
    if not hasattr(module, "get_delta_weight"):
        return None
    return module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight


def save_rest(model: Any, folder: Path) -> None:
    """Write what changes beside the adapters: routers and selection biases, which peft omits from its checkpoints."""
    save_tensors(folder / REST, {name: value.detach().cpu().contiguous() for name, value in _rest(model)})


def load_rest(model: Any, folder: Path) -> None:
    """Read what `save_rest` wrote."""
    saved = safetensors.torch.load_file(folder / REST, backend="pread")
    with torch.no_grad():
        for name, value in _rest(model):
            if name in saved:  # a sharded run stores none of the biases, which it does not move
                value.copy_(saved[name])


def _rest(model: Any) -> list[tuple[str, Any]]:
    """Return what changes beside the adapters: trained parameters, and selection biases, which balancing moves.

    Of a sharded model nothing does, by the rules of recipes.
    """
    from torch.distributed.tensor import DTensor

    return [
        (name, value)
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if ((value.requires_grad and "lora_" not in name) or name.endswith(CORRECTION_BIAS))
        and not isinstance(value, DTensor)
    ]
