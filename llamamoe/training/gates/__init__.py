"""Gates, which route tokens during training, one file each. In eval mode every gate is the native router."""

from ...plugins import Registry
from .base import Gate

GATES: Registry[Gate] = Registry("gate", Gate, __name__)  # type: ignore[type-abstract]

__all__ = ["GATES", "Gate"]
