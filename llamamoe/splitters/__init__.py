"""Splitters, one file each."""

from ..registry import Registry
from .base import Splitter

SPLITTERS: Registry[Splitter] = Registry("splitter", Splitter, __name__)  # type: ignore[type-abstract]
