"""Save the optimiser's state of a model that is sharded at loading: each rank stores its part as safetensors.

Transformers' Trainer cannot checkpoint it. A resume needs the same number of ranks, the same sharding, and a folder
that all ranks share. Not imported by plans.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ..checkpoint.files import save_tensors, write_text
from ..errors import CheckpointError
from .resuming import SCHEDULE, optimizer_file

_SCHEDULE_KEYS = ("last_epoch", "_step_count", "base_lrs", "_last_lr")


def _file(folder: Path, rank: int) -> Path:
    return folder / optimizer_file(rank)


def _parameters(optimizer: Any) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def save_optimizer(optimizer: Any, scheduler: Any, folder: Path, rank: int) -> None:
    """Write this rank's moments and steps, and (on the first rank) the state of the schedule."""
    tensors = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            local = value.to_local() if isinstance(value, DTensor) else value
            tensors[f"{index}.{key}"] = local.detach().cpu().contiguous()
    save_tensors(_file(folder, rank), tensors)
    if rank == 0:
        state = scheduler.state_dict()
        write_text(folder / SCHEDULE, json.dumps({key: state[key] for key in _SCHEDULE_KEYS}) + "\n")


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path, rank: int) -> None:
    """Read what `save_optimizer` wrote.

    Raises:
        CheckpointError: The checkpoint was written by another number of ranks, or another sharding.
    """
    path = _file(folder, rank)
    if not path.exists() or _file(folder, torch.distributed.get_world_size()).exists():
        raise CheckpointError(
            f"{folder} was not written by {torch.distributed.get_world_size()} ranks, and a sharded run can only go on "
            "with as many.",
            hint="Start as many processes as before, on a file system that all of them see.",
        )
    tensors = load_file(path, backend="pread")
    for index, parameter in enumerate(_parameters(optimizer)):
        prefix = f"{index}."
        mine = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        optimizer.state[parameter] = {key: _placed(value, parameter, key, path) for key, value in mine.items()}
    state = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
    scheduler.load_state_dict({**state, "lr_lambdas": [None] * len(optimizer.param_groups)})
    for group, rate in zip(optimizer.param_groups, state["_last_lr"], strict=True):
        group["lr"] = rate


def _placed(value: torch.Tensor, parameter: torch.Tensor, key: str, path: Path) -> torch.Tensor:
    """Restore the optimiser's placement: steps on the CPU, moments with the parameter's device and sharding."""
    if key == "step":
        return value
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if value.shape != local.shape:
        raise CheckpointError(
            f"{path.name}: a state of shape {list(value.shape)} for a shard of {list(local.shape)}.",
            hint="Go on with the sharding that the run began with (distributed: in its recipe).",
        )
    value = value.to(local.device)
    if not isinstance(parameter, DTensor):
        return value
    found: torch.Tensor = DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return found


def reshard(model: torch.nn.Module) -> None:
    """Release gathered weights after a forward pass without a backward pass.

    FSDP2 keeps those of the outermost module (embedding, last norm, head) gathered until a backward pass. An optimiser
    created meanwhile would hold the gathered copies, and a state dict would save them.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
