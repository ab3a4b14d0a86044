"""``llamamoe.bench``: how fast models read and write on this machine, beside the speed expected from their sizes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..architectures.inspect import Inspection, inspect
from ..errors import LlamaMoeError, UsageError
from ..lazy import psutil, torch
from ..models.loading import Opened, open_models, pick_device
from ..progress import ProgressCallback, counting, ignore_progress


@dataclass(frozen=True)
class Speed:
    """One model at one batch size. Times are medians over the repeats.

    Attributes:
        batch_size: Sequences that run together.
        prefill_seconds: Of reading the prompts.
        decode_seconds: Of one further token of every sequence.
        prefill_tokens_per_second: Prompt tokens of all sequences by that time.
        decode_tokens_per_second: Sequences by the time of a step.
        spread: Largest over smallest decode time of the repeats: how far the machine was at rest.
    """

    batch_size: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    spread: float


@dataclass(frozen=True)
class ModelSpeed:
    """One model.

    Attributes:
        name: The model.
        dtype: What its weights were held in.
        experts_implementation: How transformers ran its experts; None for a dense model.
        flops_per_token: Of a forward pass, by active parameters, attention scores left out.
        prefill_flops_per_token: The same of a prompt, for which the head runs once at its end.
        active_bytes: Weights that one token's decoding reads: active parameters without the embedding table.
        memory_bytes: What the model takes: of the process, after all runs, above that before it was loaded; of a GPU the
            peak, caches and activations included.
        speeds: By batch size.
    """

    name: str
    dtype: str
    experts_implementation: str | None
    flops_per_token: int
    prefill_flops_per_token: float
    active_bytes: int
    memory_bytes: int
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        device: Where.
        threads: Of torch, on a CPU.
        prompt_tokens: Of every sequence.
        new_tokens: Steps of decoding after it.
        repeats: How often each was measured.
        model: The model.
        against: Its parent, or None.
        drift: Time of the parent's decoding after the model over that before it, at the smallest batch size: 1 if the
            machine was the same.
        faster_up_to: Largest batch size up to which every measured one decodes faster than the parent's; 0: none.
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

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


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
    """Measure prefill and decoding with a cache, greedy, by plain transformers; one model is in memory at a time.

    The parent is measured before the model and, at the smallest batch size, once more after it: what differs between the two is the
    machine's doing. The prompts are a text of prose, code and several languages, begun at another place for each sequence.

    Args:
        model: A folder, a ``.gguf`` file or a hub id.
        against: The parent, measured in the same way.
        tokenizer: For GGUF files, a folder whose tokenizer is used instead of the one in the file.
        batch_sizes: Sequences that run together, each 1 or more.
        prompt_tokens: Tokens of each prompt, at least 2.
        new_tokens: Steps of decoding, at least 1.
        repeats: How often each is measured, after one run that warms up.
        dtype: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: A torch device, or ``"auto"``.
        experts_implementation: How the experts run: one of transformers' or of `llamamoe.register_experts`; None: as
            transformers chooses.
        progress: Told after every batch size.

    Raises:
        UsageError: A number is out of range, or a model or device does not exist.
        CheckpointError: A folder is not a model.
    """
    sizes = _check(batch_sizes, prompt_tokens, new_tokens, repeats)
    device = pick_device(device)
    sides = _open([each for each in (model, against) if each is not None], tokenizer, experts_implementation)
    for side, _ in sides:
        _fits(side, prompt_tokens + new_tokens)
    run = _Run(prompt_tokens, new_tokens, repeats, dtype, device)
    mine, parent, drift = _measure(run, sides, sizes, experts_implementation, progress)
    threads, faster = torch.get_num_threads(), None if parent is None else _faster_up_to(mine, parent)
    return Benchmark(device, threads, prompt_tokens, new_tokens, repeats, mine, parent, drift, faster)


def _open(
    places: Sequence[str | Path], tokenizer: str | Path | None, experts_implementation: str | None
) -> list[tuple[Opened, Inspection]]:
    inspections = [inspect(each) for each in places]
    if experts_implementation is not None and inspections[0].experts is None:
        raise UsageError(f"{inspections[0].name} is a dense model: it has no experts that could run in another way.")
    opened = open_models([Path(each.path) for each in inspections], tokenizer=tokenizer)
    return list(zip(opened, inspections, strict=True))


def _measure(
    run: _Run,
    sides: Sequence[tuple[Opened, Inspection]],
    sizes: tuple[int, ...],
    experts_implementation: str | None,
    progress: ProgressCallback,
) -> tuple[ModelSpeed, ModelSpeed | None, float | None]:
    """The model's speed, the parent's before it, and how much the machine itself changed meanwhile."""
    several = len(sides) > 1
    tell = counting("bench", len(sides) * len(sizes) + several, "run", progress)
    parent = run.measure(*sides[1], sizes, None, tell) if several else None
    mine = run.measure(*sides[0], sizes, experts_implementation, tell)
    if parent is None:
        return mine, None, None
    again = run.measure(*sides[1], sizes[:1], None, tell)
    return mine, parent, again.speeds[0].decode_seconds / parent.speeds[0].decode_seconds


def _check(batch_sizes: Sequence[int], prompt_tokens: int, new_tokens: int, repeats: int) -> tuple[int, ...]:
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


@dataclass(frozen=True)
class _Run:
    """How everything is measured."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    dtype: str
    device: str

    def measure(
        self,
        side: Opened,
        inspection: Inspection,
        sizes: Sequence[int],
        implementation: str | None,
        tell: Callable[[str], None],
    ) -> ModelSpeed:
        """One model at every batch size."""
        from ..models.loading import free_memory, load_weights

        before = _memory(self.device)
        model = load_weights(side, self.dtype, self.device)
        mixture = inspection.experts is not None
        used = _choose_experts(model, implementation) if mixture else None
        width = model.dtype.itemsize
        active = sum(n for part, n in inspection.cost.active.items() if part != "embedding")
        if inspection.tied:
            active += inspection.cost.active["embedding"]  # the table is the head, too
        speeds = []
        with torch.inference_mode():
            for size in sizes:
                speeds.append(self._speed(model, side.tokenizer, size))
                tell(f"{inspection.name}, batch {size}")
        dtype = str(model.dtype).removeprefix("torch.")
        memory = _memory(self.device, peak=True) - before
        del model
        free_memory()
        return ModelSpeed(
            name=inspection.name,
            dtype=dtype,
            experts_implementation=used,
            flops_per_token=inspection.cost.flops_per_token,
            prefill_flops_per_token=_prefill_flops(inspection, self.prompt_tokens),
            active_bytes=active * width,
            memory_bytes=memory,
            speeds=tuple(speeds),
        )

    def _speed(self, model: Any, tokenizer: Any, size: int) -> Speed:
        ids_BT = _prompts(tokenizer, size, self.prompt_tokens, model.config.vocab_size).to(model.device)
        runs = [self._once(model, ids_BT) for _ in range(self.repeats + 1)][1:]  # the first one warms up
        prefill = statistics.median(first for first, _ in runs)
        decode = statistics.median(step for _, step in runs)
        steps = [step for _, step in runs]
        return Speed(
            batch_size=size,
            prefill_seconds=prefill,
            decode_seconds=decode,
            prefill_tokens_per_second=ids_BT.numel() / prefill,
            decode_tokens_per_second=size / decode,
            spread=max(steps) / min(steps),
        )

    def _once(self, model: Any, ids_BT: torch.Tensor) -> tuple[float, float]:
        """Seconds of the prefill, and of one step of decoding."""
        started = self._now()
        out = model(ids_BT, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        read = self._now()
        for _ in range(self.new_tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return read - started, (self._now() - read) / self.new_tokens

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _prefill_flops(inspection: Inspection, prompt_tokens: int) -> float:
    """Operations of a prompt's token: of the head, which is the embedding table if it is tied, only its share of one."""
    active = inspection.cost.active
    head = 2 * active["embedding" if inspection.tied else "head"]
    return inspection.cost.flops_per_token - head * (1 - 1 / prompt_tokens)


def _choose_experts(model: Any, implementation: str | None) -> str | None:
    """Let the experts run so; the name of how they do."""
    if implementation is not None:
        from ..models.experts import register_experts

        register_experts()
        try:
            model.set_experts_implementation(implementation)
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"'{implementation}' is not a way to run experts: {str(error).splitlines()[0]}",
                hint="Try grouped_mm, batched_mm, eager, llamamoe_auto, llamamoe_masked or llamamoe_sorted.",
            ) from error
    found: str | None = getattr(model.config, "_experts_implementation", None)
    return found


def _prompts(tokenizer: Any, size: int, length: int, vocab_size: int) -> torch.Tensor:
    """int64 ``[B, T]``: the text again and again, each sequence begun at another place."""
    from ..conversion.verify_runs import RECEIPT_TEXT

    ids = torch.tensor(tokenizer(RECEIPT_TEXT, add_special_tokens=False)["input_ids"])
    if len(ids) == 0 or int(ids.max()) >= vocab_size:
        raise LlamaMoeError("the tokenizer does not suit the model: it makes ids that the model does not have.")
    rows = [(torch.arange(length) + row * 17) % len(ids) for row in range(size)]
    return ids[torch.stack(rows)]


def _memory(device: str, *, peak: bool = False) -> int:
    """Bytes in use: of the device if it is a GPU (``peak``: the most since the last call without), else of the process."""
    gc.collect()
    if device.startswith("cuda"):
        if peak:
            return int(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))

    return int(psutil.Process().memory_info().rss)
