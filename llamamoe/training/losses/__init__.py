"""Losses on routing, one file each."""

from ...plugins import Registry
from .base import LossContext, RoutingLoss

LOSSES: Registry[RoutingLoss] = Registry("loss", RoutingLoss, __name__)  # type: ignore[type-abstract]

__all__ = ["LOSSES", "LossContext", "RoutingLoss"]
