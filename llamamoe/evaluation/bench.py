"""``llamamoe.bench``: measure the speed of models on this machine, beside the speed expected from their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..architectures.expert_weighting import routes_attention
from ..architectures.inspect import Inspection, inspect
from ..errors import UsageError
from ..lazy import torch
from ..models.devices import pick_device
from ..models.loading import Opened, open_models
from ..progress import ProgressCallback, counting, ignore_progress
from .speeds import ModelSpeed, SpeedRun

STEADY = 1.15
"""Largest factor by which the parent's speed may change during a measurement."""


@dataclass(frozen=True)
class Benchmark:
    """The result of a benchmark.

    Attributes:
        device: Device of the runs.
        threads: Threads of torch, on a CPU.
        prompt_tokens: Prompt tokens of every sequence.
        new_tokens: Decoding steps after the prompt.
        repeats: Number of measurements of each.
        model: The model.
        against: Its parent, or None.
        drift: Ratio of the parent's decoding times after and before the model, at the smallest batch size: 1 if the
            machine did not change.
        faster_up_to: Largest batch size up to which decoding was faster than the parent's at every measured one; 0:
            none.
        warnings: Sentences for the user, such as that experts run one by one.
    """

    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    model: ModelSpeed
    against: ModelSpeed | None
    drift: float | None
    faster_up_to: int | None
    warnings: tuple[str, ...] = ()

    @property
    def steady(self) -> bool:
        """False if the parent's speed changed so much during the measurement that ratios to it say nothing."""
        return self.drift is None or 1 / STEADY <= self.drift <= STEADY

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible data."""
        return asdict(self) | {"steady": self.steady}


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 3,
    dtype: str = "auto",
    device: str = "auto",
    experts_implementation: str | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Benchmark:
    """Measure prefill and greedy decoding with a cache in plain transformers; one model is in memory at a time.

    The parent is measured before the model and, at the smallest batch size, once more after it: the difference between
    the two is due to the machine. The prompts are a text of prose, code and several languages, starting at another
    place for each sequence.

    Args:
        model: A folder, a ``.gguf`` file or a hub id.
        against: The parent, measured in the same way.
        tokenizer: For GGUF files, a folder whose tokenizer is used instead of the one in the file.
        batch_sizes: Sequences that run together, each 1 or more.
        prompt_tokens: Tokens of each prompt, at least 2.
        new_tokens: Steps of decoding, at least 1.
        repeats: Number of measurements of each, after a warm-up run.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: A torch device, or ``"auto"``.
        experts_implementation: How the experts run: one of transformers' or of `llamamoe.register_experts`; None:
            transformers' choice.
        progress: Called after every batch size.

    Raises:
        UsageError: A number is out of range, or a model or device does not exist.
        CheckpointError: A folder is not a model.
    """
    sizes = checked_sizes(batch_sizes, prompt_tokens, new_tokens, repeats)
    device = pick_device(device)
    sides = _open([each for each in (model, against) if each is not None], tokenizer, experts_implementation)
    for side, _ in sides:
        _fits(side, prompt_tokens + new_tokens)
    run = SpeedRun(prompt_tokens, new_tokens, repeats, dtype, device)
    mine, parent, drift = _measure(run, sides, sizes, experts_implementation, progress)
    threads, faster = torch.get_num_threads(), None if parent is None else _faster_up_to(mine, parent)
    told = tuple(note for side, _ in sides for note in side.notes)
    return Benchmark(device, threads, prompt_tokens, new_tokens, repeats, mine, parent, drift, faster, told)


def _open(
    places: Sequence[str | Path], tokenizer: str | Path | None, experts_implementation: str | None
) -> list[tuple[Opened, Inspection]]:
    inspections = [inspect(each) for each in places]
    if experts_implementation is not None and inspections[0].experts is None:
        raise UsageError(f"{inspections[0].name} is a dense model: it has no experts to choose an implementation for.")
    if experts_implementation is not None and routes_attention(inspections[0].target):
        raise UsageError(
            f"experts_implementation is {experts_implementation!r}, but the class of {inspections[0].target} in transformers has one of its own only.",
            hint="Omit --experts.",
        )
    opened = open_models([Path(each.path) for each in inspections], tokenizer=tokenizer)
    return list(zip(opened, inspections, strict=True))


def _measure(
    run: SpeedRun,
    sides: Sequence[tuple[Opened, Inspection]],
    sizes: tuple[int, ...],
    experts_implementation: str | None,
    progress: ProgressCallback,
) -> tuple[ModelSpeed, ModelSpeed | None, float | None]:
    """Return the model's speed, the parent's before it, and the drift of the machine."""
    several = len(sides) > 1
    tell = counting("bench", len(sides) * len(sizes) + several, "run", progress)
    parent = run.measure(*sides[1], sizes, None, tell) if several else None
    mine = run.measure(*sides[0], sizes, experts_implementation, tell)
    if parent is None:
        return mine, None, None
    again = run.measure(*sides[1], sizes[:1], None, tell)
    return mine, parent, again.speeds[0].decode_seconds / parent.speeds[0].decode_seconds


def checked_sizes(batch_sizes: Sequence[int], prompt_tokens: int, new_tokens: int, repeats: int) -> tuple[int, ...]:
    """Return the batch sizes in order, each once.

    Raises:
        UsageError: A number is out of range.
    """
    limits = (("prompt_tokens", prompt_tokens, 2), ("new_tokens", new_tokens, 1), ("repeats", repeats, 1))
    for name, value, least in limits:
        if value < least:
            raise UsageError(f"{name} is {value}, but must be at least {least}.")
    sizes = tuple(sorted(set(batch_sizes)))
    if not sizes or sizes[0] < 1:
        raise UsageError(f"invalid batch sizes {list(batch_sizes)}: each must be at least 1.")
    return sizes


def _fits(side: Opened, tokens: int) -> None:
    positions = getattr(side.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UsageError(
            f"prompt and new tokens are {tokens}, but '{side.name}' has only {positions} positions.",
            hint="Give a smaller --prompt or --new-tokens.",
        )


def _faster_up_to(model: ModelSpeed, parent: ModelSpeed) -> int:
    best = 0
    for mine, theirs in zip(model.speeds, parent.speeds, strict=True):
        if mine.decode_seconds >= theirs.decode_seconds:
            break
        best = mine.batch_size
    return best
