"""``llamamoe pretrain --dry-run``: estimate memory, time and disk from a recipe and the headers of two checkpoints.

Formulas and their omissions are in `activations.py`, `terms.py`, `memory.py` and `compute.py`;
``benchmarks/training_memory.py`` compares them with measured steps. No model is loaded, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...checkpoint.base import TensorInfo
from ..parameters import group_of
from ..recipe import PretrainRecipe
from .activations import Widths, experts_of, style_of
from .compute import disk, forward_operations, operations, saving
from .hardware import Hardware
from .memory import StepMemory
from .shapes import ModelShape, read_shape
from .sharding import Sharding, adapters
from .traffic import copied_bytes, exchanged_bytes, gathered_bytes


@dataclass(frozen=True)
class Estimate:
    """The requirements of a run.

    Attributes:
        state: Bytes of one device for ``weights``, ``gradients`` and ``moments``.
        parts: Contents of one device's memory at the peak, in bytes.
        moment: The moment of the peak.
        device_memory: Memory of the device in bytes; None: unknown.
        parameters: ``total``, ``active`` (of one token, counted as `llamamoe.architectures.costs` does), ``trained``
            (adapters included), ``adapters``.
        tokens_per_step: Tokens of a step, over all ranks.
        steps: Optimiser steps.
        tokens: Total number of tokens.
        accumulation: Micro-batches of a step on one rank.
        operations: Operations per token by purpose, see `compute.operations`.
        moved: Bytes of a step on one device beside operations: ``copies`` of tokens for their experts, and ``exchanged``
            with other ranks by expert parallelism; see `traffic`.
        forward_operations: Operations per token of a held-out loss.
        operations_per_second: Assumed of all devices together, ``utilisation`` of the peak; None: peak unknown.
        seconds_per_step: All operations at that rate, and the copies at the bandwidth, if it is known; None: peak
            unknown.
        disk: Bytes, see `compute.disk`.
        saving: Bytes and seconds of a save and of a resume, see `compute.saving`.
        utilisation: The assumed utilisation.
        warnings: Expected problems.
    """

    state: Mapping[str, int]
    parts: Mapping[str, int]
    moment: str
    device_memory: int | None
    parameters: Mapping[str, int]
    tokens_per_step: int
    steps: int
    tokens: int
    accumulation: int
    operations: Mapping[str, float]
    moved: Mapping[str, int]
    forward_operations: float
    operations_per_second: float | None
    seconds_per_step: float | None
    disk: Mapping[str, int]
    saving: Mapping[str, float]
    utilisation: float
    warnings: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of one device at the peak."""
        return sum(self.parts.values())

    @property
    def lines(self) -> tuple[tuple[str, int], ...]:
        """`parts` as a table (name, bytes), with their sum as the last row."""
        return (*self.parts.items(), (f"peak ({self.moment})", self.peak))

    @property
    def flops_per_token(self) -> float:
        """Sum of all ``operations``."""
        return sum(self.operations.values())

    @property
    def disk_bytes(self) -> int:
        """Sum of all bytes on ``disk`` at a time."""
        return self.disk["total"]

    @property
    def fits(self) -> bool | None:
        """True if the peak fits the device; None: its memory is unknown."""
        return None if self.device_memory is None else self.peak <= self.device_memory

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole run, without validation and saving."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON-compatible data."""
        return asdict(self) | {
            "warnings": list(self.warnings),
            "peak": self.peak,
            "flops_per_token": self.flops_per_token,
            "fits": self.fits,
            "seconds": self.seconds,
        }


def estimate(
    recipe: PretrainRecipe,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    hardware: Hardware,
    *,
    parent_tensors: Mapping[str, TensorInfo] | None = None,
    parent_config: Mapping[str, Any] | None = None,
) -> Estimate:
    """Estimate the requirements of a run. O(number of tensors).

    Args:
        recipe: The run.
        config: ``config.json`` of the converted model.
        tensors: Headers of the converted model.
        hardware: Its devices.
        parent_tensors: Headers of the parent.
        parent_config: ``config.json`` of the parent.

    Raises:
        CheckpointError: A configuration has no sizes.
    """
    shape = read_shape(config, tensors)
    parent = read_shape(parent_config, parent_tensors) if parent_config and parent_tensors else None
    sharding = Sharding(recipe.distributed.fsdp_size, recipe.distributed.ep_size)
    accumulation = max(1, recipe.batch_size // (recipe.micro_batch_size * hardware.world_size))
    memory = StepMemory(
        recipe,
        shape,
        sharding,
        parent_bytes=_parent_bytes(recipe, tensors, parent_tensors or {}, sharding),
        parent_width=max((layer.dense_width for layer in parent.layers), default=0) if parent else 0,
        accumulates=accumulation > 1,
        replicas=hardware.world_size,
    )
    added = sum(adapters(recipe, shape, layer) for layer in shape.layers)
    trained = added + sum(numel for group, numel in shape.by_group().items() if group in memory.trained)
    moment, lives = memory.peak()
    flops = operations(recipe, shape, parent, memory.trained, added, memory.run.tokens)
    moved = _moved(recipe, memory, accumulation)
    stored = disk(recipe, shape, trained, added)
    counted = parent_tensors is not None and parent_config is not None
    return Estimate(
        state=memory.state(),
        parts={name: size for name, size in lives.items() if size},
        moment=moment,
        device_memory=None if hardware.device_memory is None else int(hardware.device_memory),
        parameters={"total": shape.total, "active": shape.active, "trained": trained, "adapters": added},
        tokens_per_step=recipe.tokens_per_step,
        steps=recipe.max_steps,
        tokens=recipe.max_steps * recipe.tokens_per_step,
        accumulation=accumulation,
        operations=flops,
        moved=moved,
        forward_operations=forward_operations(recipe, shape),
        operations_per_second=hardware.operations_per_second,
        seconds_per_step=_seconds_per_step(recipe, sum(flops.values()), moved, hardware),
        disk=stored,
        saving=_saving(recipe, stored["checkpoint"], hardware),
        utilisation=hardware.utilisation,
        warnings=(
            *_memory_warnings(recipe, memory, sum(lives.values()), hardware.device_memory, counted=counted),
            *_layout_warnings(recipe, shape, hardware.world_size),
            *_traffic_warnings(recipe, memory, moved, hardware),
        ),
    )


def _moved(recipe: PretrainRecipe, memory: StepMemory, accumulation: int) -> dict[str, int]:
    """Return the bytes of a step on one device beside operations; see `Estimate`."""
    return {
        "copies": accumulation * copied_bytes(recipe, memory.run),
        "exchanged": accumulation * exchanged_bytes(recipe, memory.run),
    }


def _seconds_per_step(
    recipe: PretrainRecipe, flops: float, moved: Mapping[str, int], hardware: Hardware
) -> float | None:
    """Return the seconds of operations and copies; None: the peak is unknown."""
    rate = hardware.operations_per_second
    copying = moved["copies"] / hardware.bandwidth if hardware.bandwidth else 0.0
    return recipe.tokens_per_step * flops / rate + copying if rate else None


def _saving(recipe: PretrainRecipe, checkpoint: int, hardware: Hardware) -> dict[str, float]:
    world_size, fsdp_size = hardware.world_size, recipe.distributed.fsdp_size
    return saving(checkpoint, world_size, fsdp_size, hardware.disk_rate, background=recipe.save_in_background)


def _parent_bytes(
    recipe: PretrainRecipe, tensors: Mapping[str, TensorInfo], parent: Mapping[str, TensorInfo], sharding: Sharding
) -> int:
    """Return the parent's bytes on every rank, without shared tensors: see `llamamoe.training.parent.share_frozen`.

    A tensor counts as shared if the student's of the same name and shape is frozen and both are held in the same
    dtype; equal values are assumed. Nothing is shared with sharded weights.
    """
    if not recipe.keeps_parent:
        return 0
    width = 4 if recipe.precision.parent == "float32" else 2
    alike = recipe.precision.parent == recipe.precision.parameters and not sharding.cut
    total = 0
    for name, info in parent.items():
        group = group_of(name)
        if not recipe.runs_parent and group != "dense_ffn":
            continue
        mine = tensors.get(name)
        frozen = group in recipe.freeze or recipe.lora is not None
        if not (alike and frozen and mine is not None and mine.shape == info.shape):
            total += width * info.numel
    return total


def _memory_warnings(
    recipe: PretrainRecipe, memory: StepMemory, peak: int, device_memory: float | None, *, counted: bool
) -> Iterator[str]:
    if device_memory is not None and peak > device_memory:
        less = [] if recipe.gradient_checkpointing else ["gradient_checkpointing=true"]
        less += [] if recipe.micro_batch_size == 1 else ["micro_batch_size=1"]
        less += ["a larger distributed.fsdp_size", "lora"]
        yield (
            f"does not fit: {peak / 2**30:.1f} GiB are needed on a device that has {device_memory / 2**30:.1f} GiB; "
            f"try {', '.join(less)}"
        )
    if not counted and recipe.keeps_parent:
        yield "the parent is not counted: its headers were not given"
    if memory.shape.num_experts and memory.run.widths.casts and not memory.run.widths.casts_experts:
        yield (
            "experts run in float32 although precision.compute = bfloat16: autocast does not reach grouped_mm, so the time "
            "is underestimated; experts_implementation=llamamoe_grouped_mm computes them in bfloat16"
        )


def _traffic_warnings(
    recipe: PretrainRecipe, memory: StepMemory, moved: Mapping[str, int], hardware: Hardware
) -> Iterator[str]:
    if hardware.peak_flops and hardware.bandwidth is None and moved["copies"]:
        yield (
            f"the time leaves out {moved['copies'] / 1e9:,.0f} GB that a device moves in a step to copy tokens for their "
            f"{memory.shape.top_k} experts each: give its memory bandwidth"
        )
    exchanged, gathered = exchanged_bytes(recipe, memory.run), gathered_bytes(recipe, memory.run)
    if exchanged > gathered:
        yield (
            f"distributed.ep_size = {recipe.distributed.ep_size} sends {exchanged / 1e9:,.2f} GB of tokens for a micro-batch, because each goes to "
            f"{memory.shape.top_k} experts; FSDP2 alone (ep_size = 1) would receive {gathered / 1e9:,.2f} GB of experts"
        )


def _layout_warnings(recipe: PretrainRecipe, shape: ModelShape, world_size: int) -> Iterator[str]:
    sizes = recipe.distributed
    if sizes.sharded and world_size != sizes.world_size:
        yield f"distributed needs {sizes.world_size} processes (fsdp_size x dp_replicate_size), not {world_size}"
    if recipe.batch_size % (recipe.micro_batch_size * world_size):
        yield (
            f"batch_size = {recipe.batch_size} cannot be dealt to {world_size} ranks in micro-batches of "
            f"{recipe.micro_batch_size}"
        )
    if shape.num_experts and shape.num_experts % sizes.ep_size:
        yield f"distributed.ep_size = {sizes.ep_size} does not divide the {shape.num_experts} experts"
    if style_of(recipe, shape.model_type) != "grouped":
        return
    ours = experts_of(recipe) == "llamamoe_grouped_mm"
    unit = 16 // Widths.of(recipe, shape.model_type).experts
    for width in sorted({layer.expert_width for layer in shape.layers if layer.expert_width}):
        if width % unit:
            yield (
                f"expert width {width} is not a multiple of {unit}, which grouped products need: "
                + ("experts will run one by one; " if ours else "set experts_implementation=eager, or ")
                + "convert with --pad-to 8"
            )
