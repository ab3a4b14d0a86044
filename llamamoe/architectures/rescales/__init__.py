"""Rescales, one file each."""

from ...plugins import Registry
from .base import Rescale

RESCALES: Registry[Rescale] = Registry("rescale", Rescale, __name__)  # type: ignore[type-abstract]
