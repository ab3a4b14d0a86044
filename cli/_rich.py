"""The package rich, imported when something is drawn: help and short answers do not wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamamoe.lazy import Lazy

__all__ = ["rich"]

if TYPE_CHECKING:
    import rich
    import rich.console
    import rich.padding
    import rich.progress
    import rich.table
    import rich.text
else:
    rich = Lazy("rich")
