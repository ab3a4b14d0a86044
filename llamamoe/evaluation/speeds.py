"""Measure one model's speed: medians of repeated prefills and decoding steps."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures.inspect import Inspection
from ..errors import LlamaMoeError, UsageError
from ..lazy import psutil, torch
from ..models.experts.grouped_mm import ROW_BYTES, rows_fit
from ..models.loading import Opened, free_memory, load_weights


@dataclass(frozen=True)
class Speed:
    """One model at one batch size. Times are medians over the repeats.

    Attributes:
        batch_size: Sequences that run together.
        prefill_seconds: Time of reading the prompts.
        decode_seconds: Time of one further token of every sequence.
        prefill_tokens_per_second: Prompt tokens of all sequences divided by that time.
        decode_tokens_per_second: Sequences divided by the time of a step.
        prefill_range: Shortest and longest time of the repeats.
        decode_range: The same for `decode_seconds`.
        spread: Largest over smallest decode time of the repeats, which shows how idle the machine was.
    """

    batch_size: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]
    spread: float


@dataclass(frozen=True)
class ModelSpeed:
    """The speed of one model.

    Attributes:
        name: The model.
        dtype: Dtype of its weights.
        experts_implementation: Implementation of its experts in transformers; None for a dense model.
        flops_per_token: Operations of a forward pass, by active parameters, without attention scores.
        prefill_flops_per_token: The same for a prompt, where the head runs once at its end.
        active_bytes: Bytes of weights that decoding one token reads: active parameters without the embedding table.
        weights_bytes: Bytes of all weights, those of unselected experts included.
        memory_bytes: Memory of the model: on a CPU the growth of the process from before loading to after all runs; on
            a GPU the peak, caches and activations included.
        speeds: Speeds by batch size.
    """

    name: str
    dtype: str
    experts_implementation: str | None
    flops_per_token: int
    prefill_flops_per_token: float
    active_bytes: int
    weights_bytes: int
    memory_bytes: int
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class SpeedRun:
    """The settings of a measurement."""

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
        """Measure one model at every batch size."""
        before = _memory(self.device)
        model = load_weights(side, self.dtype, self.device)
        mixture = inspection.experts is not None
        used = _choose_experts(model, implementation) if mixture else None
        width = model.dtype.itemsize
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
            active_bytes=inspection.cost.active_parameters * width,
            weights_bytes=inspection.cost.total_parameters * width,
            memory_bytes=memory,
            speeds=tuple(speeds),
        )

    def _speed(self, model: Any, tokenizer: Any, size: int) -> Speed:
        ids_BT = _prompts(tokenizer, size, self.prompt_tokens, model.config.get_text_config().vocab_size).to(
            model.device
        )
        runs = [self._once(model, ids_BT) for _ in range(self.repeats + 1)][1:]  # the first one warms up
        prefills, steps = zip(*runs, strict=True)
        prefill, decode = statistics.median(prefills), statistics.median(steps)
        return Speed(
            batch_size=size,
            prefill_seconds=prefill,
            decode_seconds=decode,
            prefill_tokens_per_second=ids_BT.numel() / prefill,
            decode_tokens_per_second=size / decode,
            prefill_range=(min(prefills), max(prefills)),
            decode_range=(min(steps), max(steps)),
            spread=max(steps) / min(steps),
        )

    def _once(self, model: Any, ids_BT: torch.Tensor) -> tuple[float, float]:
        """Return the seconds of the prefill, and of one decoding step."""
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
    """Return the operations per prompt token, with the head (or tied embedding) counted once per prompt."""
    active = inspection.cost.active
    head = 2 * active["embedding" if inspection.tied else "head"]
    return inspection.cost.flops_per_token - head * (1 - 1 / prompt_tokens)


def _choose_experts(model: Any, implementation: str | None) -> str | None:
    """Set the implementation of the experts; return its name."""
    if implementation is not None:
        from ..models.experts import register_experts

        if implementation == "grouped_mm" and not rows_fit(model):
            raise UsageError(
                f"grouped_mm needs experts whose matrices have rows of a multiple of {ROW_BYTES} bytes, and in {model.dtype} these have not.",
                hint="Omit the implementation, which is then eager, or take llamamoe_auto.",
            )
        register_experts()
        try:
            model.set_experts_implementation(implementation)
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"'{implementation}' is not an implementation of experts: {str(error).splitlines()[0]}",
                hint="Try grouped_mm, batched_mm, eager, llamamoe_auto, llamamoe_masked or llamamoe_sorted.",
            ) from error
    found: str | None = getattr(model.config, "_experts_implementation", None)
    return found


def _prompts(tokenizer: Any, size: int, length: int, vocab_size: int) -> torch.Tensor:
    """Return int64 ``[B, T]``: the repeated text, each sequence starting at another place."""
    from ..conversion.verify_runs import RECEIPT_TEXT

    ids = torch.tensor(tokenizer(RECEIPT_TEXT, add_special_tokens=False)["input_ids"])
    if len(ids) == 0 or int(ids.max()) >= vocab_size:
        raise LlamaMoeError("the tokenizer does not suit the model: it produces ids that the model lacks.")
    rows = [(torch.arange(length) + row * 17) % len(ids) for row in range(size)]
    return ids[torch.stack(rows)]


def _memory(device: str, *, peak: bool = False) -> int:
    """Return the bytes in use on a GPU (``peak``: the maximum since the last call without it), else by the process."""
    gc.collect()
    if device.startswith("cuda"):
        if peak:
            return int(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))

    return int(psutil.Process().memory_info().rss)
