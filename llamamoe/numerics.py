"""Small linear algebra: ridge regression, and float64 on the devices that have it."""

from __future__ import annotations

from .errors import LlamaMoeError
from .lazy import torch


def solve_ridge(gram_QQ: torch.Tensor, right_QH: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
    """Return ``(G + strength)^-1 right`` in float64, O(Q^3); the Gram is changed in place, ``strength`` may be ``[Q]``.

    Rounding of the sums can leave a Gram with small negative eigenvalues: where Cholesky's method fails for that,
    the eigenvalues of ``G + strength`` are raised to their true lower bound, the
    least ``strength``.
    """
    gram_QQ.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(gram_QQ)
    if not int(failed):
        return torch.cholesky_solve(right_QH, factor)
    values, vectors = torch.linalg.eigh(gram_QQ)
    least = float(strength.min()) if isinstance(strength, torch.Tensor) else strength
    out: torch.Tensor = vectors @ ((vectors.T @ right_QH) / values.clamp(min=least)[:, None])
    return out


def check_finite(layer: int, *sums: torch.Tensor) -> None:
    """Refuse sums over the calibration tokens that are NaN or infinite.

    Raises:
        LlamaMoeError: A sum is not finite; the message names the layer.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in sums):
        raise LlamaMoeError(f"layer {layer}: NaN or infinite activations on the calibration text.")


def double_device(device: torch.device) -> torch.device:
    """Return the device for float64: the device itself, except for Apple's GPUs, which lack it."""
    return torch.device("cpu") if device.type == "mps" else device


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float64; in float32 on Apple's GPUs (mps), which lack float64."""
    return values.float() if values.device.type == "mps" else values.double()


def is_power_of_two(value: float) -> bool:
    """Return whether multiplying by ``value`` only moves the exponent of a binary float."""
    from math import frexp

    return value > 0 and frexp(value)[0] == 0.5
