"""Options of distillation from the dense parent in recipes; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ..errors import UsageError
from ..plugins import PluginOptions
from .schedules import Schedule, constant


def _layers(value: Any) -> Any:
    """Validate ``all``, or layer numbers."""
    if value == "all" or isinstance(value, list | tuple):
        return value
    raise PydanticCustomError("layers", "must be 'all' or a list of layers (negative ones count from the end)")


Layers = Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_layers)]


class LmTerm(PluginOptions):
    """Cross entropy with the text."""

    weight: Schedule = Field(constant(1.0), description="What it counts.")


class KlTerm(PluginOptions):
    """KL divergence of the student's next-token distribution from the parent's (arXiv:1503.02531)."""

    weight: Schedule = Field(constant(1.0), description="What it counts.")
    temperature: float = Field(1.0, gt=0, le=100, description="Of both distributions; the term is x temperature^2.")
    top_m: int | None = Field(
        None, ge=1, description="Only the parent's m likeliest tokens, all others as one; null: all tokens."
    )
    separators: bool = Field(
        True,
        description="Also before and after the tokens that separate documents; false for a parent that was trained without them.",
    )


class FfnTerm(PluginOptions):
    """Each converted FFN against the parent's FFN on the same input."""

    weight: Schedule = Field(constant(1.0), description="What it counts.")
    layers: Layers = Field("all", description="all: every converted layer; or a list.")
    through_parent: bool = Field(
        True,
        description="Gradient through the parent's FFN, too (twice its work more); false takes what it says as constant, "
        "so that layers before are also told to move the input of a layer that errs.",
    )


class HiddenTerm(PluginOptions):
    """Hidden states after chosen layers against the parent's."""

    weight: Schedule = Field(constant(1.0), description="What it counts.")
    layers: Layers = Field("all", description="all, or a list of the layers after which they are compared.")


class DistillOptions(PluginOptions):
    """The objective: each term is a sum over tokens; terms left at null are not computed."""

    lm: LmTerm = Field(LmTerm(), description="Language modelling on the text.")
    kl: KlTerm | None = Field(None, description="The parent's predictions.")
    ffn: FfnTerm | None = Field(None, description="The parent's FFN outputs.")
    hidden: HiddenTerm | None = Field(None, description="The parent's hidden states.")

    @property
    def needs_parent(self) -> bool:
        """True if any term compares with the parent."""
        return self.needs_forward or self.ffn is not None

    @property
    def needs_forward(self) -> bool:
        """True if the parent must be run, False if its FFNs are enough."""
        return self.kl is not None or self.hidden is not None


def resolve_layers(layers: Literal["all"] | Sequence[int], known: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return layer numbers from 0 on, each once, in order.

    Args:
        layers: Layers as given in the recipe.
        known: The layers that ``all`` refers to.
        num_layers: Layers of the model.

    Raises:
        UsageError: A layer does not exist.
    """
    if layers == "all":
        return tuple(known)
    bad = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if bad:
        raise UsageError(f"distill: there is no layer {bad[0]}: the model has {num_layers} (0 to {num_layers - 1}).")
    return tuple(sorted({layer % num_layers for layer in layers}))
