"""Schedules of numbers in training: constant, or from one value to another in a number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError

Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Schedule(BaseModel):
    """A number per step: ``0.5``, or ``{start: 1, end: 0, share: 0.3, shape: cosine}``.

    It goes from ``start`` at step 0 to ``end`` at the step that ``steps`` or ``share`` names, and stays there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Level = Field(description="Value at the first step.")
    end: Level = Field(description="Value once the change is over.")
    steps: int | None = Field(None, ge=1, description="Steps that the change takes.")
    share: float | None = Field(
        None, gt=0, le=1, description="The same as a share of all steps; without either it takes all of them."
    )
    shape: Literal["linear", "cosine"] = Field("linear", description="linear, or half a cosine: slow, fast, slow.")

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"start": value, "end": value}
        if not isinstance(value, Mapping | Schedule):
            raise PydanticCustomError("schedule", "must be a number or a mapping with 'start' and 'end'")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Schedule:
        if self.steps is not None and self.share is not None:
            raise PydanticCustomError("schedule", "give 'steps' or 'share', not both")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: Any) -> Any:
        """Serialise a constant as its number, so that equal recipes have equal text and hashes."""
        return self.start if self.start == self.end else handler(self)

    @property
    def largest(self) -> float:
        """The maximum value; 0 means that the weighted term is never needed."""
        return max(self.start, self.end)

    def value(self, step: int, max_steps: int) -> float:
        """Return the value at a step.

        Args:
            step: Optimiser steps finished before this one, from 0 on.
            max_steps: Total number of steps.

        Raises:
            ValueError: The step is negative.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        length = self.steps if self.steps is not None else (self.share or 1.0) * max_steps
        done = min(1.0, step / length) if length > 0 else 1.0
        if self.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return self.start + (self.end - self.start) * done


def constant(value: float) -> Schedule:
    """Return a schedule that always has this value."""
    return Schedule(start=value, end=value)
