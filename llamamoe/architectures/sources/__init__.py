"""Dense families that can be converted, one file each."""

from ...plugins import Registry
from .base import DenseSpec, Read, Source

__all__ = ["SOURCES", "DenseSpec", "Read", "Source"]

SOURCES: Registry[Source] = Registry("dense family", Source, __name__)  # type: ignore[type-abstract]
