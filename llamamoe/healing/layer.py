"""Heal one layer: build, measure and train it, measure it again as stored, and keep or discard the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import set_size
from ..checkpoint.tensors import torch_dtype
from ..lazy import torch
from ..methods.layer import FfnWeights, LayerInputs
from ..methods.moe_layer import dense_outputs
from .block import NativeFfn, load_ffn
from .plan import HealPlan, config_of
from .train_layer import LayerTask, layer_error, start_router, train_layer


@dataclass(frozen=True)
class HealedLayer:
    """The result of healing one layer.

    Attributes:
        tensors: Changed tensors by their names in the files.
        facts: Facts for the receipt.
    """

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def parent_outputs(inputs: LayerInputs, ffn: FfnWeights, dtype: torch.dtype, path: Path | None) -> torch.Tensor:
    """Return the outputs of the parent's FFN, ``[T, H]`` of a dtype on the CPU; in a mapped file if given a path."""
    shape = (inputs.num_tokens, inputs.x_TH.shape[1])
    if path is None:
        aims_TH = torch.empty(shape, dtype=dtype)
    else:
        set_size(path, shape[0] * shape[1] * dtype.itemsize)
        aims_TH = torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)
    for part, y_BH in zip(inputs.batches(), dense_outputs(inputs, ffn), strict=True):
        aims_TH[part] = y_BH.to("cpu", dtype)
    return aims_TH


def stored_ffn(plan: HealPlan, layer: int, tensors: Mapping[str, torch.Tensor], *, renormalised: bool) -> NativeFfn:
    """Return the layer's FFN as the files will hold it.

    Args:
        plan: The plan.
        layer: Index of the layer.
        tensors: Tensors that replace the checkpoint's own.
        renormalised: Whether the configuration changes to renormalising.
    """

    def read(name: str) -> torch.Tensor:
        return tensors[name] if name in tensors else plan.checkpoint.read(name)

    return load_ffn(plan, layer, read, keys=config_of(plan, renormalised=renormalised))


def heal_layer(plan: HealPlan, task: LayerTask, *, renormalised: bool) -> HealedLayer:
    """Train one layer; leave it unchanged if that did not lower the error on the held-out tokens.

    Args:
        plan: The plan.
        task: The layer's inputs and targets.
        renormalised: Whether to make the router's weights sum to one.

    Raises:
        LlamaMoeError: The error is no longer finite.
    """
    device, layer = task.inputs.device, task.layer
    ffn = load_ffn(plan, layer, plan.checkpoint.read).to(device)
    before = layer_error(ffn, task, task.held_out)
    if renormalised:
        ffn.renormalise()
    names = {name: torch_dtype(plan.checkpoint.tensors[name].dtype) for name in plan.trained_names(layer)}
    unhealed = {}
    if renormalised:
        dirty = {n: d for n, d in names.items() if n != plan.router_name(layer)}
        unhealed = {n: value for n, value in ffn.stored(dirty).items() if not value.equal(plan.checkpoint.read(n))}
    facts: dict[str, Any] = {"layer": layer, "error_before": before}
    if plan.recipe.router == "trained":
        facts |= start_router(ffn, task)
    train_layer(ffn, task)
    tensors = ffn.stored(names)
    del ffn
    healed = stored_ffn(plan, layer, tensors, renormalised=renormalised).to(device)
    after = layer_error(healed, task, task.held_out)
    facts |= {"error_after": after, "error_after_on_trained_tokens": layer_error(healed, task, task.trained)}
    better = math.isfinite(after) and (after < before or not math.isfinite(before))
    facts["kept"] = better
    if not better:
        facts["note"] = "healing did not lower the error on held-out tokens, so the layer is left unchanged"
    facts = {
        key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in facts.items()
    }
    return HealedLayer(tensors if better else unhealed, facts)
