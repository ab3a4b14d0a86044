"""Losses on routing, one file each."""

from collections.abc import Iterable

from ...plugins import Registry
from ...recipes import Choice
from .base import LossContext, RoutingLoss

LOSSES: Registry[RoutingLoss] = Registry("loss", RoutingLoss, __name__)  # type: ignore[type-abstract]

__all__ = ["LOSSES", "LossContext", "RoutingLoss", "made"]


def made(losses: Iterable[Choice]) -> list[RoutingLoss]:
    """Return a recipe's losses on the routing."""
    kinds = [(LOSSES.get(each.name), each.options) for each in losses]
    return [kind(kind.Options(**options)) for kind, options in kinds]
