"""Sum metrics over micro-batches and ranks between two log lines, and write the lines to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import open_append, write_text
from ..errors import CheckpointError, LlamaMoeError
from ..lazy import torch
from ..numerics import wide

TIMES = "time"
"""The key of a line for values that differ between runs: seconds, tokens per second, memory."""


class Sums:
    """Named sums of detached scalars, and per-domain sums of token losses; nothing is synchronised until they are read.

    Args:
        domains: Names of the domains, in the order of their numbers.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = tuple(domains)
        self._scalars: dict[str, torch.Tensor] = {}
        self._per_domain: torch.Tensor | None = None

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a scalar to the sum called ``name``."""
        value = wide(value.detach())
        self._scalars[name] = self._scalars[name] + value if name in self._scalars else value

    def add_domains(self, domains_B: torch.Tensor, nll_B: torch.Tensor, tokens: int) -> None:
        """Add each sequence's summed loss, and its ``tokens``, to its domain."""
        if self._per_domain is None:
            self._per_domain = wide(torch.zeros(2, len(self.domains), device=nll_B.device))
        index, sums_B = domains_B.to(nll_B.device), wide(nll_B.detach())
        self._per_domain[0].index_add_(0, index, sums_B)
        self._per_domain[1].index_add_(0, index, torch.full_like(sums_B, tokens))

    def read(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Return and reset the sums over all ranks: ``name -> sum`` and ``domain -> (sum of losses, tokens)``.

        Every rank must call it, with the same names.
        """
        from .ranks import all_reduced

        if not self._scalars and self._per_domain is None:
            return {}, {}
        names = sorted(self._scalars)
        parts = [self._scalars[name].reshape(1) for name in names]
        if self._per_domain is not None:
            parts.append(self._per_domain.reshape(-1))
        values = all_reduced(torch.cat(parts)).tolist()
        scalars = dict(zip(names, values, strict=False))
        rest, count = values[len(names) :], len(self.domains)
        per_domain = {
            name: (rest[i], rest[count + i]) for i, name in enumerate(self.domains) if rest and rest[count + i] > 0
        }
        self._scalars, self._per_domain = {}, None
        return scalars, per_domain


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, the same for the same run except for values under ``time``.

    Args:
        path: The file.
        writes: Whether this process writes it.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._started = time.monotonic()

    def resume(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which will be repeated, and a line truncated by a kill.

        Changes at ``step`` are dropped too: the run that continues from there records its own.
        """
        if not self._writes or not self.path.exists():
            return
        lines = (line for line in read_lines(self.path) if line["step"] <= step)
        kept = [line for line in lines if line["step"] < step or line.get("kind") != "change"]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, Any]:
        """Append a line and return it.

        Raises:
            LlamaMoeError: The line cannot be written; a partial line is dropped on a resume.
        """
        line = {"step": step, **values, TIMES: {"seconds": round(time.monotonic() - self._started, 3), **times}}
        if self._writes:
            try:
                with open_append(self.path) as file:
                    file.write((json.dumps(line) + "\n").encode("utf-8"))
            except OSError as error:
                raise LlamaMoeError(
                    f"step {step}: {self.path} cannot be written: {error.strerror or error}.",
                    hint="Free some space, then go on with --resume from the last checkpoint.",
                ) from error
        return line


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics file."""
    lines = (_parsed(text) for text in path.read_bytes().split(b"\n"))
    return [line for line in lines if line is not None]


def check_lines(path: Path) -> None:
    """Refuse a metrics file that is damaged anywhere except in a last line truncated by a kill.

    Raises:
        CheckpointError: A line is damaged; the message names it.
    """
    try:
        texts = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, text in enumerate(texts[:-1], start=1):
        if _parsed(text) is None:
            raise CheckpointError(
                f"{path}, line {number} is damaged: it is not a JSON object with a step and a loss as numbers.",
                hint="Mend or delete that line; the run itself does not depend on it.",
            )


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return line if isinstance(line.get("loss"), float | int | None) else None


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with None for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and (v != v or abs(v) == float("inf")) else v for k, v in values.items()}


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second of devices, by a part of their name; from the vendors' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Return the peak bfloat16 operations per second of a device; None if unknown (no utilisation is reported)."""
    return next((value for part, value in PEAK_FLOPS.items() if part in device_name), None)


def active_parameters(model: torch.nn.Module, layers: Iterable[Any]) -> int:
    """Return the parameters that one token uses, counted as in `llamamoe.architectures.costs`."""
    inactive = 0
    for moe in layers:
        inactive += moe.num_routed * (moe.num_experts - moe.top_k) // moe.num_experts
    return sum(p.numel() for p in model.parameters()) - inactive - _looked_up(model)


def _looked_up(model: Any) -> int:
    """Return the parameters of the input embedding, unless it is also the head."""
    embedding = model.get_input_embeddings().weight
    return 0 if model.get_output_embeddings().weight is embedding else embedding.numel()


def training_flops(multiplied: int, num_layers: int, attention_width: int, length: int) -> float:
    """Return operations per token, forward and backward: 6 per multiplied parameter, and causal attention's products.

    PaLM's count (arXiv:2204.02311, appendix B), of active parameters only, with half of the attention matrix. The width
    of attention is that of all heads together.
    """
    return 6.0 * multiplied + 6.0 * num_layers * attention_width * length
