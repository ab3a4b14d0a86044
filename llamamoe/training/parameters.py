"""Choose the parameters that a run trains, their optimiser groups, and learning rates by step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures.costs import role_of
from ..errors import CheckpointError, UsageError
from ..lazy import torch
from .moe_layers import CORRECTION_BIAS
from .recipe import PretrainRecipe
from .recipe_parts import GROUPS, LrScheduleRecipe

_EXPERT_GROUPS = ("experts", "shared")
_NO_DECAY = ("router", "norms")
_DOWN = re.compile(r"\.(down_proj|output_linear)\b")

_GROUPS = {
    "routed": "experts",
    "routed_attention": "experts",
    "norm": "norms",
    "embedding": "embeddings",
    "stub": "shared",
}
"""Roles with another name here, in the plural."""


def group_of(name: str) -> str:
    """Return the group, one of `GROUPS`, of a parameter by its dotted name, ignoring what adapters insert.

    Raises:
        UsageError: The parameter is in no group.
    """
    role = role_of(name)
    group = _GROUPS.get(role, role)
    if group not in GROUPS:
        raise UsageError(f"the parameter {name!r} belongs to none of the groups {', '.join(GROUPS)}.")
    return group


def freeze(model: torch.nn.Module, groups: Iterable[str]) -> dict[str, int]:
    """Freeze every parameter of ``groups``, and always the selection biases, which no gradient reaches.

    Returns:
        Number of trainable parameters by group.

    Raises:
        UsageError: Nothing is left to train; or the head is tied to embeddings of which only one is frozen.
    """
    frozen = set(groups)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if tied and len(frozen & {"embeddings", "head"}) == 1:
        raise UsageError(
            "freeze: this model's head is its embedding, so freeze both or neither of embeddings and head."
        )
    for name, parameter in model.named_parameters():
        if group_of(name) in frozen or name.endswith(CORRECTION_BIAS):
            parameter.requires_grad_(False)
    trained = count_trained(model)
    if not trained:
        raise UsageError(f"freeze = {', '.join(sorted(frozen))}: nothing is left to train.")
    return trained


def count_trained(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters by group, with adapters in the group that they adapt."""
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name)
            trained[group] = trained.get(group, 0) + parameter.numel()
    return trained


def baked_factor(model: torch.nn.Module) -> float:
    """Return the factor baked into routed down projections, as recorded in config.json; 1 if not recorded.

    Raises:
        CheckpointError: The factor is not a number above 0.
    """
    block = getattr(getattr(model, "config", None), "llamamoe", None)
    value = (block if isinstance(block, dict) else {}).get("baked_factor", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"config.json: llamamoe.baked_factor is {value!r}, but must be a number above 0.",
            hint="Set optimizer.down_lr_factor, which takes its place.",
        )
    return float(value)


def _scaled_parameters(model: torch.nn.Module) -> set[int]:
    """Return the ids of the routed down projections, and of those halves of their adapters that start at zero."""
    found = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if _DOWN.search(name) and "lora_" not in name and group_of(name) == "experts"
    }
    for name, module in model.named_modules():
        # peft wraps a parameter without a separate module, and keeps its name.
        target = getattr(module, "parameter_name", None)
        if isinstance(target, str) and _DOWN.search(whole := f"{name}.{target}") and group_of(whole) == "experts":
            found |= {id(parameter) for parameter in module.lora_B.parameters()}
    return found


def optimizer_groups(
    model: torch.nn.Module, recipe: PretrainRecipe, extra: Iterable[torch.nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW, in a fixed order: each has ``lr``, ``weight_decay`` and a ``name``.

    A step of Adam has about the size of its learning rate, whatever the size of the weights. Where a router's weights
    sum to one, or to less, a conversion multiplies the experts' down projections by k or N, so that outputs keep their
    size; at the plain rate these would learn that many times slower than in the dense model. Their rate is multiplied
    by that factor (`down_lr_factor`), and their decay divided by it, so that both are, relative to the weights, the
    same as for all others.

    Args:
        model: The model, each of whose trained parameters is in one group.
        recipe: Learning rates and decay.
        extra: Parameters of a gate, which count as the router's.
    """
    optimizer = recipe.optimizer
    factor = baked_factor(model) if optimizer.down_lr_factor is None else optimizer.down_lr_factor
    scaled = _scaled_parameters(model)
    experts_lr = optimizer.lr if optimizer.experts_lr is None else optimizer.experts_lr
    rates = {"router": optimizer.router_lr, "experts": experts_lr, "experts_down": experts_lr * factor}
    decay = {"experts_down": optimizer.weight_decay / factor}
    members: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name)
            decays = parameter.ndim >= 2 and group not in _NO_DECAY
            kind = "router" if group == "router" else "experts" if group in _EXPERT_GROUPS else "rest"
            if factor != 1 and id(parameter) in scaled:
                kind = "experts_down"
            members.setdefault((kind, decays), []).append(parameter)
    if extras := list(extra):
        members.setdefault(("router", False), []).extend(extras)
    return [
        {
            "params": parameters,
            "lr": optimizer.lr if (rate := rates.get(kind)) is None else rate,
            "weight_decay": decay.get(kind, optimizer.weight_decay) if decays else 0.0,
            "name": kind,
        }
        for (kind, decays), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


@dataclass(frozen=True)
class LrSchedule:
    """The factor of the learning rate, as a function of the step.

    Attributes:
        shape: ``cosine``, ``linear``, ``wsd`` (warm-up, stable, decay: arXiv:2404.06395) or ``constant``.
        warmup_steps: Steps of linear rise.
        max_steps: Steps in all.
        min_ratio: Last factor.
        decay_share: For ``wsd``, the share of the steps in which it decays.
        hold_steps: Steps at the start in which the factor is 0, after which the schedule starts.
    """

    shape: str
    warmup_steps: int
    max_steps: int
    min_ratio: float
    decay_share: float = 0.2
    hold_steps: int = 0

    @classmethod
    def of(cls, recipe: LrScheduleRecipe, max_steps: int, hold_steps: int = 0) -> LrSchedule:
        """Return the schedule of a recipe; a warm-up given as a share becomes steps."""
        steps = max(1, max_steps - hold_steps)
        warmup = recipe.warmup if isinstance(recipe.warmup, int) else math.ceil(recipe.warmup * steps)
        return cls(recipe.shape, warmup, max_steps, recipe.min_ratio, recipe.decay_share, hold_steps)

    def __call__(self, step: int) -> float:
        """Return the factor at the coming step, counted from 0."""
        step, total = step - self.hold_steps, max(1, self.max_steps - self.hold_steps)
        if step < 0:
            return 0.0
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        start = (
            self.warmup_steps if self.shape != "wsd" else max(self.warmup_steps, int(total * (1 - self.decay_share)))
        )
        done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.min_ratio + (1 - self.min_ratio) * fall


def lr_factors(groups: Iterable[dict[str, Any]], recipe: PretrainRecipe) -> list[Callable[[int], float]]:
    """Return a factor function for every group: all but the routers wait until the router's warm-up is over.

    Waiting is a learning rate of 0, not a missing gradient, so that data-parallel wrappers get the same graph
    throughout.
    """

    def factor(hold_steps: int) -> Callable[[int], float]:
        schedule = LrSchedule.of(recipe.lr_schedule, recipe.max_steps, hold_steps)
        return lambda step: schedule(step)  # a plain function, which the scheduler's state omits

    return [factor(0 if group["name"] == "router" else recipe.router.warmup_steps) for group in groups]


def follow_recipe(optimizer: Any, scheduler: Any, groups: Sequence[dict[str, Any]], recipe: PretrainRecipe) -> None:
    """Replace the rates that a checkpoint's optimiser and schedule brought along by those of a recipe.

    Args:
        optimizer: With the state of a checkpoint.
        scheduler: Likewise; a LambdaLR, wrapped or not.
        groups: The `optimizer_groups` of the recipe.
        recipe: To go on with.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    scheduler.base_lrs = [group["lr"] for group in groups]
    options = {"betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
    for group, new, factor in zip(optimizer.param_groups, groups, lr_factors(groups, recipe), strict=True):
        rate = new["lr"] * factor(scheduler.last_epoch)
        group.update(options, weight_decay=new["weight_decay"], initial_lr=new["lr"], lr=rate)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
