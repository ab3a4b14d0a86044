"""Methods to choose the shared neurons (``shared_by``), one file each."""

from ...plugins import Registry
from .base import Selector

SELECTORS: Registry[Selector] = Registry("shared_by", Selector, __name__)  # type: ignore[type-abstract]
