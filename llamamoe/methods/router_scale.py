"""Scale a router's rows: hard routers give all selected experts equal weights and keep the ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..lazy import torch

HARD_LOGIT = 2.0**-8
"""Target for the largest logits of a hard router: weights are equal to about this share.

It trades two things, both linear in it:

- *Equality of the weights.* A weight deviates by its logit. 2^-8 is the resolution of bfloat16, so the deviation is
  within the rounding of a bfloat16 file. All experts of the file as stored then give the parent's logits to about half
  of it.
- *Agreement of programs on the experts.* Transformers and others choose by softmax probabilities in float32, some by
  logits. Probabilities near 1/N are spaced by 2^-24 to 2^-23 of their size, so logits closer than d = 1e-7 tie, and
  ties are broken arbitrarily. Between ranks k and k + 1 of N logits of standard deviation s the gap is about
  exponential with a mean of sqrt(2 pi) s / N, and the largest logit is about 5 s: a share of 2 d N / HARD_LOGIT of the
  tokens ties. That is 0.04 % for 8 experts and 0.3 % for 64 in each layer.

Measured on SmolLM2-135M (`benchmarks/hard_router.py`), experts chosen by float32 probabilities differ from those chosen
by logits on 1.2 % of the tokens for 4 of 8 experts and on 11.6 % for 24 of 64 where the largest logit is 5e-5, on 0.02
% and 0.2 % where it is 3e-3 to 4e-3; the file as stored is 3e-5 and 1.9e-3 of the largest logit from its parent.

Hard routers do not suit programs that store the probabilities in bfloat16 (as mlx-lm for qwen2_moe): with 64 experts
they choose different experts on 37 % of the tokens even where the largest logit is 0.8. Such programs need float32
weights, another target or a soft router.
"""

TYPICAL_MAXIMUM = 8.0
"""Assumed size of the largest logit in standard deviations; `llamamoe verify` measures it."""

HARD_BELOW = 32 * HARD_LOGIT
"""Threshold, by this estimate, between the largest logits of hard and other routers."""

FLOAT16_ROW_RMS = 2.0**-13
"""Lower limit of float16 rows, because subnormal numbers would destroy the ranking."""


@dataclass(frozen=True)
class ScaledRouter:
    """A router ready to be stored.

    Attributes:
        rows_NH: float32 ``[N, H]``.
        exponent: The rows were multiplied by ``2**exponent`` (0 for a soft router).
        logit_bound: Upper bound of logits: ``sqrt(H) max_i ||norm * row_i||``, because RMSNorm's output has norm
            ``sqrt(H)`` before its weight.
    """

    rows_NH: torch.Tensor
    exponent: int
    logit_bound: float


def scale_router(
    rows_NH: torch.Tensor, norm_H: torch.Tensor, mode: str, dtype: str, *, largest: float | None = None
) -> ScaledRouter:
    """Shrink the rows of a ``hard`` router by a power of two; leave a ``soft`` one unchanged.

    The power of two is the largest for which the largest logit on calibration text stays below `HARD_LOGIT`. Without
    text: for inputs of random direction, a logit has the standard deviation ``||norm * row||``, and
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


def is_hard(rows_NH: torch.Tensor, norm_H: torch.Tensor) -> bool:
    """Return whether stored rows are a hard router's, which gives all selected experts about equal weights.

    Args:
        rows_NH: ``[N, H]``.
        norm_H: ``[H]``, the weight of the RMSNorm whose output the router reads.
    """
    return TYPICAL_MAXIMUM * float((rows_NH.double() * norm_H.double()).norm(dim=1).max()) < HARD_BELOW
