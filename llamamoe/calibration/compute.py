"""Device and dtype of calibration, and their speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..lazy import torch
from ..models.devices import pick_device


@dataclass(frozen=True)
class Compute:
    """Device and dtype of large products.

    Attributes:
        device: A torch device.
        dtype: ``float32`` or ``bfloat16``.
    """

    device: torch.device
    dtype: torch.dtype

    def to_json(self) -> dict[str, Any]:
        """Return device and dtype as JSON-compatible data."""
        return {"device": str(self.device), "compute_dtype": str(self.dtype).removeprefix("torch.")}

    def flops_per_second(self, seconds: float = 0.0) -> float:
        """Measure the best rate of a few matrix products, or of all within some seconds, which other work disturbs less."""
        size = 512 if self.device.type == "cpu" else 4096
        a = torch.ones(size, size, device=self.device, dtype=self.dtype)
        best, until, turns = 0.0, time.perf_counter() + seconds, 0
        while turns < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            out = a @ a
            out[0, 0].item()  # waits for the device
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
            turns += 1
        return best

    def expected_rate(self, seconds: float = 0.0) -> float:
        """Return the operations per second to expect of a conversion, from the measured rate of large products.

        On a CPU all that is not a product takes its time beside them, and most where they are fast. With two cores three
        conversions are met to 14 %: an EPYC in float32 (137 of 195 GFLOP/s) and bfloat16 (199 of 423), a Xeon with AMX
        (347 of 1080).
        """
        products = self.flops_per_second(seconds)
        if self.device.type != "cpu":
            return _PEAK_SHARE * products
        return 1 / (_PRODUCTS / products + 1 / (_OTHERS * torch.get_num_threads()))


_PEAK_SHARE = 0.5
_PRODUCTS, _OTHERS = 0.82, 2e11
"""Share of a conversion's operations in large products, and the rate of each thread that all others allow."""


def choose_compute(device: str, compute_dtype: str | None, source_dtype: str) -> Compute:
    """Choose the device and the dtype that a recipe names, or the best ones for the machine.

    ``auto`` selects the first GPU if there is one. Without a dtype, products are in bfloat16 if the
    source's weights have 16 bits (its own values are no finer) and the device multiplies bfloat16 at least twice
    as fast as float32: a GPU that has it, or a processor with AMX or with AMD's AVX-512 (Intel's multiplies both equally
    fast). Sums are accumulated in float32.

    Args:
        device: ``"auto"`` or a torch device.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or None.
        source_dtype: Safetensors name of the dtype of most of the source's weights.

    Raises:
        UsageError: The device is not available.
    """
    place = torch.device(pick_device(device))
    if compute_dtype is not None:
        return Compute(place, getattr(torch, compute_dtype))
    half = source_dtype in ("BF16", "F16") and _fast_bfloat16(place)
    return Compute(place, torch.bfloat16 if half else torch.float32)


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        amd = str(found.get("cpu_name", "")).startswith("AMD")
        return bool(found.get("amx_bf16", False) or (amd and found.get("avx512_bf16", False)))
    return False


MIN_TOKENS = 256
"""Minimum number of tokens for calibration."""
MAX_LENGTH = 512
"""Default number of tokens per calibration sequence: for the same total, short sequences from many
documents are more informative than long ones from few."""
MEMORY_BYTES = 4 * 2**30
"""Size up to which the FFN's inputs are kept in memory; larger ones go to a memory-mapped file."""
REFERENCE_FLOPS = 1e11
"""Floating-point operations per second for the estimate of ``--dry-run``: about two laptop cores in float32."""
FAST_FLOPS = 3.5e11
"""The same of two fast cores: a Xeon with AMX in bfloat16."""
