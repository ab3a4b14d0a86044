"""Architectures that can be written, one file each."""

from ...plugins import Registry
from .base import Target

TARGETS: Registry[Target] = Registry("target", Target, __name__)  # type: ignore[type-abstract]
