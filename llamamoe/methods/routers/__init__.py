"""Router initialisers, one file each."""

from ...plugins import Registry
from .base import Router

ROUTERS: Registry[Router] = Registry("router", Router, __name__)  # type: ignore[type-abstract]
