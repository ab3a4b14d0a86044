"""Splitters, which partition neurons into experts, one file each."""

from ...plugins import Registry
from .base import Splitter

SPLITTERS: Registry[Splitter] = Registry("splitter", Splitter, __name__)  # type: ignore[type-abstract]
