"""``llamamoe.retop``: select another number of the same experts per token, with the rescale adjusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.expert_weighting import (
    Mixing,
    equal_pieces,
    is_routed_down,
    may_overlap,
    mixing_of,
    rescale_of,
    rescaled_block,
)
from ..architectures.moe_layout import weight
from ..architectures.rescales import RESCALES
from ..checkpoint.reader import SafetensorsCheckpoint
from ..errors import UsageError
from ..lazy import torch
from ..numerics import is_power_of_two
from ..progress import ProgressCallback, ignore_progress
from ..words import plural
from .rewrite import Rewriting, opened, rewrite


@dataclass(frozen=True)
class RetopResult:
    """The result of `retop`.

    Attributes:
        out: The output folder.
        top_k: k before and after.
        factor: Additional factor of the routed experts' outputs that keeps the rescale.
        where: Place of that factor: ``"config"``, ``"weights"`` or, if it is 1, ``"nowhere"``.
        exact: Whether it does not round.
        receipt: The content of ``llamamoe_derived.json``.
        warnings: Sentences for the user.
    """

    out: Path
    top_k: tuple[int, int]
    factor: float
    where: str
    exact: bool
    receipt: dict[str, Any]
    warnings: tuple[str, ...]


def retop(
    model: str | Path,
    out: str | Path,
    top_k: int,
    *,
    rescale: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> RetopResult:
    """Write a copy of a converted checkpoint that selects another number of experts per token.

    With ``c(k)`` the coefficient of the rescale (see `llamamoe.architectures.rescales`) and ``w(k)`` the router's
    weight of one selected expert at equal logits, routed outputs must be multiplied by ``c(k) / w(k)``. The change of
    that factor with k goes into ``routed_scaling_factor`` if the architecture has one, else into the experts' down
    projections; often it is 1 (`dropout` with renormalised weights, `unit` with a plain softmax).

    Args:
        model: A converted checkpoint.
        out: The folder to create.
        top_k: The new k.
        rescale: Name of the rescale in effect, for a model without a record; None: the one that the conversion
            recorded, and none for a model of another origin, whose router is left unchanged.
        resume: Finish a stopped call with the same arguments.
        force: Replace ``out`` if it holds a checkpoint by llamamoe, and discard the work of a stopped call.
        progress: Called after every layer.

    Raises:
        UsageError: k is not between 1 and N, or is unchanged.
        RefusedError: The model is not a supported mixture, or OUT cannot be written.
    """
    location, checkpoint = opened(model)
    mixing = mixing_of(checkpoint.config)
    before = mixing.top_k
    _check(mixing, top_k)
    name = rescale_of(checkpoint.config, rescale)
    factor = _factor(mixing, top_k, name)
    where = "nowhere" if factor == 1 else "config" if mixing.target.scaling_knob else "weights"
    exact = where != "weights" or is_power_of_two(factor)
    warnings = tuple(_warnings(checkpoint.config, name, before, top_k, exact))
    facts = {"from": before, "to": top_k, "rescale": name, "factor": factor, "where": where}
    job = Rewriting(
        deed="retop",
        title=f"{location.name} with {top_k} of {mixing.num_experts} experts",
        sources=(location,),
        checkpoints=(checkpoint,),
        config=_config(checkpoint.config, mixing, top_k, name, exact),
        make=lambda tensor: _value(checkpoint, tensor, factor if where == "weights" else 1.0),
        facts=facts,
        story=f"The experts of `{location.name}`, {top_k} of {mixing.num_experts} selected per token instead of "
        f"{before}. {_told(factor, where, name)}",
        warnings=warnings,
    )
    receipt = rewrite(job, out, resume=resume, force=force, progress=progress)
    return RetopResult(Path(out).expanduser(), (before, top_k), factor, where, exact, receipt, warnings)


def _check(mixing: Mixing, top_k: int) -> None:
    if not 1 <= top_k <= mixing.num_experts:
        raise UsageError(f"k = {top_k}, but it must be from 1 to {mixing.num_experts}, the number of experts.")
    if top_k == mixing.top_k:
        raise UsageError(f"k is {top_k} already.", hint="Give another --top-k.")


def _factor(mixing: Mixing, top_k: int, rescale: str | None) -> float:
    """Return the additional factor of routed outputs."""
    if rescale is None:
        return 1.0
    ratio = _whole_factor(mixing, top_k, rescale) / _whole_factor(mixing, mixing.top_k, rescale)
    return 1.0 if abs(ratio - 1.0) < 1e-12 else ratio


def _whole_factor(mixing: Mixing, top_k: int, rescale: str) -> float:
    """Return the factor of routed outputs beyond the router's weight: ``c(k) / w(k)``."""
    n = mixing.num_experts
    return RESCALES.get(rescale)().coefficient(n, top_k) / weight(mixing.weighting, n, top_k)


def _value(checkpoint: SafetensorsCheckpoint, name: str, factor: float) -> torch.Tensor:
    from ..checkpoint.tensors import cast

    value = checkpoint.read(name)
    if factor == 1.0 or not is_routed_down(name):
        return value.contiguous()
    return cast(value, value.dtype, factor).contiguous()


def _config(config: dict[str, Any], mixing: Mixing, top_k: int, rescale: str | None, exact: bool) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in mixing.target.derived}
    found = {**kept, mixing.target.top_k_key: top_k}
    if rescale is None:
        return found
    ratio = _factor(mixing, top_k, rescale)
    if mixing.target.scaling_knob:
        found["routed_scaling_factor"] = mixing.factor * ratio
    place = "config" if mixing.target.scaling_knob else "weights"
    # a model of another origin is recorded from here on
    told = {"factor": 1.0, "baked_factor": 1.0, **(config.get("llamamoe") or {})}
    block = rescaled_block(told, **{place: ratio}) | {"rescale": rescale, "top_k": top_k}
    if not exact and "exactness" in block:
        block["exactness"] = f"{block['exactness']}; down projections were rounded once more when k was changed"
    return found | {"llamamoe": block}


def _told(factor: float, where: str, rescale: str | None) -> str:
    if where == "nowhere":
        return "No other change was needed."
    place = "`routed_scaling_factor`" if where == "config" else "the down projections of the routed experts"
    return f"For the rescale `{rescale}` {place} were multiplied by {factor:.6g}."


def _warnings(config: dict[str, Any], rescale: str | None, before: int, top_k: int, exact: bool) -> list[str]:
    block, found = config.get("llamamoe") or {}, []
    if rescale is None:
        found.append(
            "the model does not record a rescale: its router's weights are left unchanged (give --rescale to change that)"
        )
    if not exact:
        found.append("the experts' down projections are rounded once to their dtype: the factor is not a power of two")
    if block.get("repair"):
        found.append(
            f"the repair was fitted with {plural(before, 'expert')} selected: with another number it fits less well"
        )
    if may_overlap(config):
        found.append(
            f"neurons may be in several experts, scaled for {before} selected ones: with another number they count too "
            "much or too little"
        )
    trained = block.get("healed") or block.get("trained")
    pieces = equal_pieces(config)
    if top_k % pieces and not trained:
        found.append(
            f"the {pieces} pieces of a split expert have equal router rows: of an expert that is not selected whole, arbitrary ones run"
        )
    if trained:
        found.append(
            f"the model was trained with {plural(before, 'expert')} selected: measure it again with this number"
        )
    return found
