"""Repairs of a converted layer from calibration text, one file each."""

from ...plugins import Registry
from .base import Repair

REPAIRS: Registry[Repair] = Registry("repair", Repair, __name__)  # type: ignore[type-abstract]
