"""Correct a linear map by ridge regression on what it misses, with a strength that held-out tokens choose."""

from __future__ import annotations

from typing import Literal

from ...lazy import torch
from ...numerics import solve_ridge
from .normal_equations import NormalEquations

Penalty = Literal["mean", "median", "balanced"]
AUTO_START, AUTO_STEP, AUTO_LEAST, AUTO_MOST = 0.3, 10**0.5, 1e-4, 1e3
"""Start, step and ends of the search for the strength."""


def corrected(
    down_HP: torch.Tensor, equations: list[NormalEquations], ridge: float | Literal["auto"], penalty: Penalty
) -> torch.Tensor:
    """Return the refitted projection ``[H, P]``, or the same one if it is best; the sums are changed in place.

    Args:
        down_HP: The projection that the sums are relative to.
        equations: Sums over the tokens to fit on, and for ``auto`` over those held out.
        ridge: Strength, in units of the penalty, or ``auto``.
        penalty: Its unit.
    """
    sums, *others = equations
    strength = best_strength(sums, others[0], penalty) if ridge == "auto" else float(ridge)
    if strength is None:
        return down_HP
    for held_out in others:
        # The strength acts like a number of tokens: with more tokens, less is needed.
        before = float(sums.gram_PP.trace())
        sums.gram_PP.add_(held_out.gram_PP)
        sums.cross_PH.add_(held_out.cross_PH)
        strength *= before / float(sums.gram_PP.trace())
    kept = sums.places
    if not len(kept):
        return down_HP
    gram_QQ = sums.gram(kept)
    correction_QH = solve_ridge(gram_QQ, sums.cross_PH[kept], strength * penalties(gram_QQ, penalty))
    found = down_HP.clone()
    found[:, kept.cpu()] += correction_QH.T.to(found.device, found.dtype)
    return found


def penalties(gram_QQ: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """Return the factor of the strength for every place, float64 ``[Q]``."""
    power_Q = gram_QQ.diagonal().clone()
    if penalty == "mean":
        return power_Q.mean().expand_as(power_Q)
    median = power_Q.median()
    return median.expand_as(power_Q) if penalty == "median" else (power_Q * median).sqrt()


def best_strength(fit: NormalEquations, held_out: NormalEquations, penalty: Penalty) -> float | None:
    """Return the strength whose correction lowers the held-out error most; None if none lowers it.

    Hill climbing from `AUTO_START` in steps of a factor sqrt(10), as the error has nearly always one minimum: about
    five solutions.
    """
    places = fit.places
    if not len(places):
        return None
    gram_QQ, cross_QH = fit.gram(places), fit.cross_PH[places]
    base_Q = penalties(gram_QQ, penalty)
    other_QQ, other_QH = held_out.gram(places), held_out.cross_PH[places]
    changes: dict[int, float] = {}

    def change(step: int) -> float:
        """Return the change of the sum of squared errors by the correction."""
        if step not in changes:
            strength = AUTO_START * AUTO_STEP**step
            if not AUTO_LEAST <= strength <= AUTO_MOST:
                return float("inf")
            c_QH = solve_ridge(gram_QQ.clone(), cross_QH, strength * base_Q)
            changes[step] = float(((other_QQ @ c_QH - 2 * other_QH) * c_QH).sum())
        return changes[step]

    best = 0
    way = 1 if change(1) < change(0) else -1
    while change(best + way) < change(best):
        best += way
    return AUTO_START * AUTO_STEP**best if change(best) < 0 else None
