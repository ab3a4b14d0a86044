"""Divide the weights of a model among the ranks as files of one native checkpoint.

A checkpoint of a run is a model of its own, which every tool can load. Each rank writes the tensors of some layers under
the names that the architecture has on the Hub: no rank holds more than its share, and with several replicas nothing is
stored twice. Not imported by plans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.reader import SINGLE
from .shards import PendingFile, State

_LAYER = re.compile(r".*\.layers\.[0-9]+\.")
Owners = list[tuple[list[str], int]]
"""Names of tensors that belong together, and the rank that writes them."""


def pending_weights(
    model: Any, folder: Path, rank: int, world: int, *, copy: bool = False, file_bytes: int | None = None
) -> PendingFile | None:
    """Return the file of weights that this rank is to write; None if it writes none.

    Every rank must call it: sharded tensors are gathered one at a time, and kept by the rank that writes them, on the
    CPU.

    Args:
        model: The model.
        folder: The checkpoint.
        rank: This rank.
        world: Number of ranks.
        file_bytes: Size from which one more rank writes, as far as there are layers; None: all do at any size.
        copy: Copy weights that are on the CPU already, so that they may change before the file is written.
    """
    state = _own_tensors(model)
    sizes = {name: value.numel() * value.element_size() for name, value in state.items()}
    owners = divide(sizes, world if file_bytes is None else min(world, -(-sum(sizes.values()) // file_bytes)))
    share: State = {}
    for names, owner in owners:
        unit: State = {}
        for name in names:
            whole = _whole(state[name])  # by all ranks together
            if owner == rank:
                unit[name] = whole.to("cpu", copy=copy)
        if unit:
            with quiet_transformers():
                share |= revert_weight_conversion(model, unit)
    writers = sorted({owner for _, owner in owners})
    if rank not in writers:
        return None
    number = f"model-{writers.index(rank) + 1:05d}-of-{len(writers):05d}.safetensors"
    return PendingFile(folder / (SINGLE if len(writers) == 1 else number), share)


def _own_tensors(model: Any) -> State:
    """Return parameters and stored buffers under their names in the model, with tied ones once."""
    once = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    left_out = again | set(model._keys_to_ignore_on_save or ())
    return {name: value.detach() for name, value in model.state_dict().items() if name not in left_out}


def divide(sizes: Mapping[str, int], world: int) -> Owners:
    """Give each layer, and each tensor outside of them, to the rank with the fewest bytes so far, the largest first."""
    units: dict[str, list[str]] = {}
    for name in sizes:
        layer = _LAYER.match(name)
        units.setdefault(layer[0] if layer else name, []).append(name)
    held = [0] * world
    owners: dict[str, int] = {}
    for unit in sorted(units, key=lambda unit: -sum(sizes[name] for name in units[unit])):
        owners[unit] = min(range(world), key=lambda rank: held[rank])
        held[owners[unit]] += sum(sizes[name] for name in units[unit])
    return [(names, owners[unit]) for unit, names in units.items()]


def _whole(value: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole


def save_config(model: Any, folder: Path) -> None:
    """Write the configurations of a model as its ``save_pretrained`` does."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 makes subclasses
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def reshard(model: torch.nn.Module) -> None:
    """Release gathered weights after a forward pass without a backward pass.

    FSDP2 keeps those of the outermost module (embedding, last norm, head) gathered until a backward pass. An optimiser
    created meanwhile would hold the gathered copies, and a state dict would save them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
