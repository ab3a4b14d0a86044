"""Update rules of the training mixture, from losses to weights of the domains, one file each."""

from ....plugins import Registry
from .base import MixtureUpdate

MIXTURES: Registry[MixtureUpdate] = Registry("mixture update", MixtureUpdate, __name__)  # type: ignore[type-abstract]
