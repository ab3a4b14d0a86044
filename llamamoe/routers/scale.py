"""The size of a router's rows: hard routers weigh all selected experts the same and keep the ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HARD_LOGIT = 1e-4
"""The size that the largest logits of a hard router should have: weights are equal to about this share."""

TYPICAL_MAXIMUM = 8.0
"""How many standard deviations the largest logit is taken to be at; `llamamoe verify` measures it."""

FLOAT16_ROW_RMS = 2.0**-13
"""Float16 rows are not shrunk below this: subnormal numbers would destroy the ranking."""


@dataclass(frozen=True)
class ScaledRouter:
    """A router ready to be stored.

    Attributes:
        rows_NH: float32 ``[N, H]``.
        exponent: The rows were multiplied by ``2**exponent`` (0 for a soft router).
        logit_bound: No logit can be larger: ``sqrt(H) max_i ||norm * row_i||``, because RMSNorm's output has norm
            ``sqrt(H)`` before its weight.
    """

    rows_NH: torch.Tensor
    exponent: int
    logit_bound: float


def scale_router(
    rows_NH: torch.Tensor, norm_H: torch.Tensor, mode: str, dtype: str, *, largest: float | None = None
) -> ScaledRouter:
    """Shrink the rows of a ``hard`` router by a power of two; leave a ``soft`` one as it is.

    The power of two is the largest for which the largest logit on calibration text stays below `HARD_LOGIT`. Without
    text: for inputs that point anywhere, a logit has the standard deviation ``||norm * row||``, and
    `TYPICAL_MAXIMUM` of them must stay below it.

    Args:
        rows_NH: float32 ``[N, H]``.
        norm_H: ``[H]``, the weight of the RMSNorm whose output the router reads.
        mode: ``"hard"`` or ``"soft"``.
        dtype: Safetensors name of the dtype that the rows will be stored in.
        largest: Largest absolute logit on calibration text, if there is some.
    """
    deviation = float((rows_NH.double() * norm_H.double()).norm(dim=1).max())
    size = TYPICAL_MAXIMUM * deviation if largest is None else largest
    exponent = 0
    if mode == "hard" and size > 0 and math.isfinite(size):
        exponent = min(0, math.floor(math.log2(HARD_LOGIT / size)))
        if dtype == "F16":
            rms = float(rows_NH.double().pow(2).mean(dim=1).sqrt().max())
            exponent = max(exponent, min(0, math.ceil(math.log2(FLOAT16_ROW_RMS / rms))))
    bound = math.sqrt(rows_NH.shape[1]) * deviation * 2.0**exponent
    return ScaledRouter(rows_NH * 2.0**exponent, exponent, bound)
