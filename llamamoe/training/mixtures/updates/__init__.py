"""Update rules of the training mixture, one file each: losses in, weights of the domains out."""

from ....plugins import Registry
from .base import MixtureUpdate

MIXTURES: Registry[MixtureUpdate] = Registry("mixture update", MixtureUpdate, __name__)  # type: ignore[type-abstract]
