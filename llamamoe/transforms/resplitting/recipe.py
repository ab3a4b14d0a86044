"""Recipes of ``llamamoe resplit``: how experts are partitioned, and how many of the pieces are selected."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...checkpoint.layout import SHARD_SIZE, SHARD_SIZE_RULE
from ...conversion.recipe import (
    AUTO,
    CalibrationLength,
    CalibrationText,
    CalibrationTokens,
    CalibrationWeights,
    Device,
)
from ...methods.repairs import REPAIRS
from ...methods.splitters import SPLITTERS
from ...recipes import Choice, Recipe, breaks, choose, form

WITHOUT_TEXT, WITH_TEXT = "kmeans", "token_clusters"
"""The default methods."""


def usable_methods(*, text: bool = False) -> list[str]:
    """Return the splitters that partition an expert exactly, without text or with it."""
    needs = ("nothing", "weights", "activations") if text else ("nothing", "weights")
    found = (SPLITTERS.get(name) for name in SPLITTERS.names())
    kept = (each for each in found if each.routed and each.parity == "exact" and each.needs in needs)
    return [each.name for each in kept if each().parts(2) == 2]


def _named_methods() -> list[str]:
    return usable_methods(text=True)


class ResplitRecipe(Recipe):
    """Everything that decides what ``llamamoe resplit`` writes, beside MODEL."""

    pieces: int = Field(description="Number of smaller experts made of each expert (m).")
    top_k: int | None = Field(
        None,
        ge=1,
        description="Smaller experts selected per token; null: all pieces of the experts that MODEL selects.",
    )
    method: Annotated[Choice | None, choose(SPLITTERS, named=_named_methods)] = Field(
        None, description="How the neurons of an expert are partitioned; null: kmeans, with text token_clusters."
    )
    repair: Annotated[Choice, choose(REPAIRS)] = Field(
        Choice(name="least_squares"),
        validate_default=True,
        description="With a smaller top_k, how down projections are refitted to the outputs of MODEL's experts.",
    )
    calibration: CalibrationText = ()
    calibration_tokens: CalibrationTokens = 65536
    calibration_weights: CalibrationWeights = None
    calibration_length: CalibrationLength = None
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of large products on calibration text; stored weights are not rounded to it."
    )
    device: Device = Field(
        "auto", description="Where calibration runs: auto (a GPU if there is one), cpu, cuda or cuda:1"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Random seed.")
    shard_size: Annotated[str, form(SHARD_SIZE, SHARD_SIZE_RULE)] = Field(
        "5GB", description="Maximum size of one weights file, for example 5GB or 500MB."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ResplitRecipe:
        if AUTO in self.calibration:
            raise breaks("calibration", "'auto' (text sampled from the model) is for dense models only: give files")
        if self.calibration_weights is not None and not any(self.calibration_weights.values()):
            raise breaks("calibration_weights", "all are zero")
        return self

    @property
    def chosen(self) -> Choice:
        """The method, completed."""
        if self.method is not None:
            return self.method
        return Choice(name=WITH_TEXT if self.calibration else WITHOUT_TEXT)

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide the result: all but the paths of the text and the device."""
        return self.model_dump(mode="json", exclude={"calibration", "device"})


load_resplit_recipe = ResplitRecipe.load
