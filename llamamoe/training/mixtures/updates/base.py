"""The interface of an update rule, which computes the domains' weights from their losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from ....errors import LlamaMoeError, UsageError
from ....lazy import np
from ....plugins import Plugin


class MixtureUpdate(Plugin, ABC):
    """A rule that changes the weights of the domains during training.

    Attributes:
        dynamic: Whether it ever changes them, so that losses are needed.
    """

    dynamic: ClassVar[bool] = True

    def update(
        self, weights: Mapping[str, float], losses: Mapping[str, float], reference_losses: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the new weights, of sum 1. Domains of weight 0 keep it: they are not trained on.

        Args:
            weights: The current weights.
            losses: Mean loss of each domain on held-out text, in nats.
            reference_losses: The loss that each domain should reach, in nats.

        Raises:
            UsageError: A loss is missing.
            LlamaMoeError: A loss is not finite, or the rule gives unusable weights.
        """
        names = [name for name, weight in weights.items() if weight > 0]
        for what, given in (("loss", losses), ("reference loss", reference_losses)) if self.dynamic else ():
            for name in names:
                if name not in given:
                    raise UsageError(f"the mixture update {self.name!r} needs the {what} of the domain {name!r}.")
                if not np.isfinite(given[name]):
                    raise LlamaMoeError(
                        f"the {what} of the domain {name!r} is {given[name]}: no mixture follows from it."
                    )
        losses_D, reference_D = (
            np.array([given.get(name, 0.0) for name in names]) for given in (losses, reference_losses)
        )
        new_D = self.rule(np.array([weights[name] for name in names], np.float64), losses_D, reference_D)
        if not (np.isfinite(new_D).all() and (new_D > 0).all()):
            raise LlamaMoeError(
                f"the mixture update {self.name!r} leads to weights that are zero or not finite: {dict(zip(names, new_D.tolist(), strict=True))}."
            )
        return dict.fromkeys(weights, 0.0) | dict(zip(names, (new_D / new_D.sum()).tolist(), strict=True))

    @abstractmethod
    def rule(self, weights_D: np.ndarray, losses_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        """Apply the formula to float64 ``[D]``, with positive weights; return positive weights of sum 1."""


def softmax(logits_D: np.ndarray) -> np.ndarray:
    """Return the softmax in float64, without overflow."""
    shifted_D = np.exp(logits_D - logits_D.max())
    found: np.ndarray = shifted_D / shifted_D.sum()
    return found
