"""Measures of the damage of converting each layer, one file each."""

from ....plugins import Registry
from .base import Sensitivity

SENSITIVITIES: Registry[Sensitivity] = Registry("measure", Sensitivity, __name__)  # type: ignore[type-abstract]
