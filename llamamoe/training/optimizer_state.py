"""Save and load the optimiser's state, the state of its schedule, and each rank's random numbers.

Everything of a parameter is stored under the parameter's name, so that a run can go on with any number of ranks and any
sharding. Not imported by plans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import write_text
from ..errors import CheckpointError
from .adamw import local
from .resuming import OPTIMIZER, SCHEDULE
from .shards import State, load_shards, stored

_SCHEDULE_KEYS = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
_RANDOM = re.compile(r"random\.([0-9]+)\.(cpu|cuda)")


def named_groups(
    groups: Iterable[dict[str, Any]], model: torch.nn.Module, gate: Iterable[torch.nn.Parameter]
) -> list[dict[str, Any]]:
    """Return optimiser groups in which every parameter has a name, which torch keeps in ``param_names``.

    Args:
        groups: Groups of parameters of model and gate.
        model: The model.
        gate: The gate's own parameters, in their order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    names |= {id(parameter): f"gate.{index}" for index, parameter in enumerate(gate)}
    return [{**group, "params": [(names[id(each)], each) for each in group["params"]]} for group in groups]


def named(optimizer: Any) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Yield name, parameter and group of everything that an optimiser of named parameters trains."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, parameter, group


def optimizer_state(optimizer: Any) -> State:
    """Return moments and steps of all parameters, as they are sharded."""
    state: State = {}
    for name, parameter, _ in named(optimizer):
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            state[f"{name}/{key}"] = value.detach().reshape(1) if value.ndim == 0 else value.detach()
    return state


def random_state(rank: int) -> State:
    """Return the state of this rank's generators."""
    found = {f"random.{rank}.cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        found[f"random.{rank}.cuda"] = torch.cuda.get_rng_state()
    return found


def save_schedule(scheduler: Any, folder: Path) -> None:
    """Write the state of the schedule."""
    state = scheduler.state_dict()
    write_text(folder / SCHEDULE, json.dumps({key: state[key] for key in _SCHEDULE_KEYS}) + "\n")


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Read the state of optimiser and schedule from a checkpoint, written by any number of ranks.

    Raises:
        CheckpointError: It does not fit the parameters that are trained.
    """
    there = stored(folder / OPTIMIZER)
    keys: dict[str, list[str]] = {}
    for each in there:
        name, _, key = each.rpartition("/")
        keys.setdefault(name, []).append(key)
    state: State = {}
    for name, parameter, group in named(optimizer):
        found = {key: _empty(parameter, key, group, *there[f"{name}/{key}"]) for key in keys.get(name, ())}
        state |= {f"{name}/{key}": value for key, value in found.items()}
        optimizer.state[parameter] = {
            key: value.reshape(()) if key == "step" else value for key, value in found.items()
        }
    unused = [name for name in there if name not in state and not _RANDOM.fullmatch(name)]
    if unused:
        raise CheckpointError(f"{folder} holds a state of {unused[0]!r}, which is not trained by this run.")
    load_shards(state, folder / OPTIMIZER)
    _load_schedule(optimizer, scheduler, folder)


def _empty(
    parameter: torch.Tensor, key: str, group: dict[str, Any], shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return memory for a state: with its parameter's device and sharding, but steps where the optimiser keeps them."""
    if shape == parameter.shape and key != "step":
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    on_device = key != "step" or group.get("fused") or group.get("capturable")
    return torch.empty(shape, dtype=dtype, device=local(parameter).device if on_device else "cpu")


def _load_schedule(optimizer: Any, scheduler: Any, folder: Path) -> None:
    state = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
    scheduler.load_state_dict({**state, "lr_lambdas": [None] * len(optimizer.param_groups)})
    for group, rate in zip(optimizer.param_groups, state["_last_lr"], strict=True):
        group["lr"] = rate


def load_random(folder: Path, rank: int, world: int, seed: int) -> None:
    """Set this rank's generators as they were; with another number of ranks, by seed and rank.

    Batches, noise of gates and the mixture have generators of their own, which depend on seed and step alone, so that
    they are the same on any number of ranks: only dropout draws from these.

    Args:
        folder: The checkpoint.
        rank: This rank.
        world: Number of ranks.
        seed: Of the run, other than that at its start.
    """
    there = stored(folder / OPTIMIZER)
    ranks = {int(found[1]) for name in there if (found := _RANDOM.fullmatch(name))}
    state = {name: torch.empty(*there[name][:1], dtype=there[name][1]) for name in random_state(rank) if name in there}
    if len(ranks) != world or not state:
        torch.manual_seed(seed + rank)
        return
    load_shards(state, folder / OPTIMIZER, together=False)
    for name, value in state.items():
        if name.endswith("cpu"):
            torch.random.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value)
