"""Choose the torch device on which a model runs, and refuse one that does not exist."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

from ..errors import UsageError
from ..lazy import torch


def pick_devices(name: str) -> list[str]:
    """Return the devices of that name, on which copies of a model run side by side.

    Args:
        name: ``"auto"`` (the GPU if there is one), a torch device, several with commas between them (a copy of the
            model on each), ``"all"`` (a copy on every GPU), or ``"spread"`` (one copy, its layers over all GPUs).

    Raises:
        UsageError: The device does not exist.
    """
    if name == "spread":
        return ["spread"]
    if name == "all":
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if not found:
            raise UsageError("The device 'all' means every GPU, and torch finds none.", hint="Use 'auto' or 'cpu'.")
        return found
    return [pick_device(each.strip()) for each in name.split(",")]


def pick_device(name: str) -> str:
    """Return the device of that name, with ``"auto"`` resolved.

    Raises:
        UsageError: The device does not exist.
    """
    if name in ("all", "spread") or "," in name:
        raise UsageError(
            f"The device '{name}' means several devices, but this runs on one.", hint="Name one, such as cuda:0."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise _unavailable(name, str(error).splitlines()[0]) from error
    return name


def check_device(name: str) -> None:
    """Refuse a CUDA device in a plan, without importing torch, if this machine cannot have one.

    Looks at what every such device needs: a torch that was built for it, by its version file, and on Linux NVIDIA's driver
    library. A device that passes may still not exist, which `pick_device` finds when the run begins.

    Raises:
        UsageError: The device cannot be available; the message is that of the run.
    """
    if not name.startswith("cuda"):
        return
    if _built_for("hip"):
        return
    if _built_for("cuda") is False:
        raise _unavailable(name, "Torch not compiled with CUDA enabled")
    if sys.platform == "linux" and not _has_driver():
        raise _unavailable(name, "Found no NVIDIA driver on your system.")


def _built_for(kind: str) -> bool | None:
    """Return whether the installed torch was built for ``"cuda"`` or ``"hip"``; None if its version file does not say."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = re.search(rf"(?m)^{kind}\b.*= *(.+)$", file.read_text(encoding="utf-8")) if file.is_file() else None
    return None if found is None else found[1].strip() != "None"


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _unavailable(name: str, reason: str) -> UsageError:
    return UsageError(
        f"the device '{name}' is not available: {reason}",
        hint="Use --device cpu, or auto for the GPU if there is one. CUDA devices need an NVIDIA driver and a torch "
        "built with CUDA.",
    )
