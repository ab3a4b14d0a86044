"""Choose how bfloat16 matrices are multiplied on a CPU: directly, by torch's own kernel for a row, or in float32."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ...lazy import torch

CPUINFO = Path("/proc/cpuinfo")
ROWS, NUMBERS = 50, 1.6e7
"""Number of rows from which converting a matrix pays; fewer for a small one, because a call of oneDNN takes longer than
one of MKL: ``(ROWS - rows) * numbers < NUMBERS``. On a Xeon without AMX, two threads: matrices of 0.46 M numbers from
12 rows, of 0.9 M to 3.7 M from 30 to 45."""

SMALL = 1 << 20
"""Maximum size of a matrix that torch's own kernel multiplies by a row."""


def float32_products(x_TI: torch.Tensor, rows: float, numbers: int) -> bool:
    """Return whether to multiply these bfloat16 rows by a matrix after converting both to float32.

    The sum is the same up to its order: a product of two bfloat16 numbers fits into float32, in which all
    kernels add up.

    Args:
        x_TI: The rows; only their dtype and device matter.
        rows: Average number of rows per matrix.
        numbers: Size of the matrix.
    """
    pays = (ROWS - rows) * numbers < NUMBERS
    return pays and x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" and _float32_is_faster()


@cache
def has_amx() -> bool:
    """Return whether this machine's processor multiplies bfloat16 in tiles (Intel AMX), and torch uses them."""
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@cache
def _float32_is_faster() -> bool:
    return float32_is_faster(CPUINFO.read_text(errors="replace")) if CPUINFO.exists() else False


def float32_is_faster(cpuinfo: str) -> bool:
    """Return whether a processor multiplies large float32 matrices faster than bfloat16 ones, by its flags in Linux.

    Without bfloat16 instructions oneDNN emulates them. Intel's AVX-512 ones do as many operations per second as its
    float32 ones, but matrices must be packed for them: oneDNN reaches 85 GFLOP/s on a core where MKL reaches 160. With
    AMX, and on other vendors' processors, bfloat16 is faster or was not measured. The result depends on the processor
    only, so a run repeated on one machine gives the same bytes.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    keys: dict[str, str] = {}
    for key, _, value in lines:
        keys.setdefault(key.strip(), value.strip())
    flags = set(keys.get("flags", "").split())
    if not flags or "amx_bf16" in flags:
        return False
    return "avx512_bf16" not in flags or keys.get("vendor_id") == "GenuineIntel"


@contextmanager
def products_of_a_row(x_TH: torch.Tensor, numbers: int) -> Iterator[None]:
    """Multiply a bfloat16 row by small matrices by torch's own kernel, which starts faster than oneDNN.

    For matrices of 0.5 M numbers the loop over 24 of 64 experts took 0.85 of the time, for 0.9 M the same and for 3.7 M
    1.1 times as much. The switch affects the whole process, so it is used only if no other thread computes; those that
    end with the process are ignored (progress bars).

    Args:
        x_TH: The row.
        numbers: Size of each matrix.
    """
    backends: Any = torch.backends  # its types lack the setter
    switch = backends.mkldnn
    fits = numbers <= SMALL and x_TH.dtype == torch.bfloat16 and x_TH.device.type == "cpu" and switch.enabled
    if not fits or torch.compiler.is_compiling() or backends.flags_frozen() or not _alone():
        yield
        return
    switch.enabled = False
    try:
        yield
    finally:
        switch.enabled = True


def _alone() -> bool:
    return sum(not thread.daemon for thread in threading.enumerate()) == 1 and not threading.current_thread().daemon
