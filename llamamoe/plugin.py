"""What splitters, routers, selectors and rescales have in common: a name, a help line, a source, options."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Needs = Literal["nothing", "weights", "activations", "gradients"]


class Options(BaseModel):
    """Base of every plug-in's options: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin:
    """A named method with options of its own.

    Attributes:
        name: What the user types.
        summary: One line for ``llamamoe methods``.
        reference: The paper or source of the rule; empty if it is our own or folklore.
        needs: What the method must be shown beside sizes; ``"activations"`` and ``"gradients"`` mean that
            calibration text is required.
        Options: The pydantic model of the method's options, each with a description and a default.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    needs: ClassVar[Needs] = "nothing"

    class Options(Options):
        """No options."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options = options if options is not None else self.Options()
