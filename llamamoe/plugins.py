"""Plug-ins: their common base, and their discovery in a folder, so that adding one is adding one file.

A *kind* (splitter, router, target, ...) is a package whose modules each define concrete subclasses of the kind's
base class, or one module that defines all of them. Third parties register theirs with an entry point in the group
``llamamoe.<package name>``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from .errors import UsageError, near_misses

T = TypeVar("T")


class Registry(Generic[T]):
    """All plug-ins of one kind, by name, found on first use.

    Args:
        kind: The word for one plug-in in messages, for example ``"splitter"``.
        base: The base class that a plug-in must derive from; it has a class attribute ``name``.
        package: Dotted name of the package whose modules hold the plug-ins, or of the one module that does.
    """

    def __init__(self, kind: str, base: type[T], package: str) -> None:
        self.kind = kind
        self.base = base
        self.package = package

    @cached_property
    def _found(self) -> dict[str, type[T]]:
        package = importlib.import_module(self.package)
        found: dict[str, type[T]] = {}
        inside = [each.name for each in pkgutil.iter_modules(getattr(package, "__path__", ()))]
        for module in (package, *(importlib.import_module(f"{self.package}.{name}") for name in inside)):
            for cls in self._classes(module):
                self._add(found, cls, module.__name__)
        for entry in entry_points(group=self.package):
            self._add(found, entry.load(), entry.value)
        return dict(sorted(found.items()))

    def _classes(self, module: ModuleType) -> Iterator[type[T]]:
        for member in vars(module).values():
            if (
                inspect.isclass(member)
                and issubclass(member, self.base)
                and member.__module__ == module.__name__
                and not inspect.isabstract(member)
                and "name" in vars(member)
            ):
                yield member

    def _add(self, found: dict[str, type[T]], cls: Any, origin: str) -> None:
        if not (inspect.isclass(cls) and issubclass(cls, self.base)):
            raise TypeError(f"{origin} is registered as a {self.kind} but is not a subclass of {self.base.__name__}")
        name = cls.name  # type: ignore[attr-defined]
        if name in found:
            raise ValueError(f"two plug-ins have the name {self.kind} {name!r}: {found[name]} and {cls}")
        found[name] = cls

    def names(self) -> list[str]:
        """Return the names of all plug-ins, sorted."""
        return list(self._found)

    def get(self, name: str) -> type[T]:
        """Return the plug-in called ``name``.

        Raises:
            UsageError: The name is unknown; the message lists similar ones.
        """
        try:
            return self._found[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} {name!r}.", hint=near_misses(name, self.names())) from None

    def __iter__(self) -> Iterator[type[T]]:
        return iter(self._found.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._found  # in a foreign file it may be a list

    def refresh(self) -> None:
        """Forget the plug-ins found, so that the next use searches again (for plug-ins added while running)."""
        self.__dict__.pop("_found", None)


Needs = Literal["nothing", "weights", "activations", "gradients"]


class PluginOptions(BaseModel):
    """Base of every plug-in's options: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin:
    """A named method with its own options.

    Attributes:
        name: Its name in recipes and options.
        summary: One line for ``llamamoe methods``.
        reference: The paper or source of the rule; empty if it is original, folklore or a control, as its docstring
            states.
        needs: The input of the method besides sizes; ``"activations"`` and ``"gradients"`` mean that
            calibration text is required.
        Options: The pydantic model of the method's options, each with a description and a default.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    needs: ClassVar[Needs] = "nothing"

    class Options(PluginOptions):
        """No options."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options = options if options is not None else self.Options()

    def training_flops(self, places: int, hidden_size: int, tokens: int) -> int:
        """Return the floating-point operations of gradient steps on one layer, for the plan; 0: there are none.

        Args:
            places: Neurons of the layer, padding included.
            hidden_size: Size of their inputs.
            tokens: Number of calibration tokens.
        """
        return 0
