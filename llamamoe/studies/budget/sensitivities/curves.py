"""Damage of every layer at any share of its FFN, from a few measured shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....lazy import np

DEFAULT_EXPONENT = 1.5
"""``p`` if a layer was measured at one share only: between linear and quadratic in the removed share."""
EXPONENTS = (0.5, 4.0)
"""Bounds of ``p`` beyond the measured shares."""
_LEAST = 1e-9  # share of the largest damage that counts as zero


@dataclass(frozen=True)
class Curves:
    """The damage of converting each layer alone, by the share of its FFN that stays active.

    Between and beyond the measured shares ``b`` a layer's damage follows power laws ``a (1 - b)^p`` in the removed
    share: straight lines in log-log. Damage never grows with the share: if a measurement contradicts this, the larger
    one is used for both.

    Attributes:
        shares_B: float64 ``[B]``, ascending, each in (0, 1): active multiply-adds over the dense FFN's.
        damage_BL: float64 ``[B, L]``, not negative.
    """

    shares_B: np.ndarray
    damage_BL: np.ndarray

    def __post_init__(self) -> None:
        shares = self.shares_B
        if not len(shares) or (shares[1:] <= shares[:-1]).any() or shares[0] <= 0 or shares[-1] >= 1:
            raise ValueError(f"shares must ascend between 0 and 1, not {shares.tolist()}")
        if self.damage_BL.shape[0] != len(shares) or not (self.damage_BL >= 0).all():
            raise ValueError("damage must be [B, L] and not negative")

    @property
    def num_layers(self) -> int:
        """``L``, the number of layers."""
        return int(self.damage_BL.shape[1])

    def at(self, share: float) -> np.ndarray:
        """Return float64 ``[L]``: the damage of each layer with an active ``share``; 0 from share 1 on. O(B L)."""
        largest = float(self.damage_BL.max(initial=0.0))
        if share >= 1 or largest == 0:
            return np.zeros(self.num_layers)
        damage = np.maximum.accumulate(self.damage_BL[::-1], axis=0)[::-1]
        y = np.log(np.maximum(damage, _LEAST * largest))
        x, at = np.log1p(-self.shares_B), float(np.log1p(-share))
        if len(x) == 1:
            slope = np.full(self.num_layers, DEFAULT_EXPONENT)
            left = 0
        else:
            left = int(np.clip(np.searchsorted(self.shares_B, share) - 1, 0, len(x) - 2))
            slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
            if not self.shares_B[0] <= share <= self.shares_B[-1]:
                slope = np.clip(slope, *EXPONENTS)
                left = 0 if share < self.shares_B[0] else len(x) - 1
        found: np.ndarray = np.exp(y[left] + slope * (at - x[left]))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the measured values as JSON-compatible data."""
        return {"shares": self.shares_B.tolist(), "damage": self.damage_BL.tolist()}
