"""Recipes of ``llamamoe heal``: text, its amount, and training settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..conversion.recipe import Device
from ..errors import near_misses
from ..recipes import Count, Paths, Recipe, breaks

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _losses(value: Any) -> Any:
    """Validate names and coefficients; only losses that suit a single layer are allowed."""
    from ..training.losses import LOSSES

    if not isinstance(value, Mapping):
        raise PydanticCustomError("choice", "must be a mapping of names and coefficients ({switch: 0.01})")
    known = [name for name in LOSSES.names() if not LOSSES.get(name).needs_targets]
    for name in value:
        if name not in known:
            raise PydanticCustomError("choice", f"unknown loss {name!r}. " + near_misses(str(name), known))
    return dict(value)


class HealRecipe(Recipe):
    """Everything that decides what ``llamamoe heal`` writes."""

    text: Paths = Field(min_length=1, description="Text to distil on: files, folders or globs.")
    tokens: Annotated[int, Count] = Field(
        262144, ge=512, le=2**40, description="Maximum number of tokens of text, held-out ones included."
    )
    length: Annotated[int, Field(ge=2), Count] | None = Field(
        None, description="Tokens per sequence; null: the parent's context length, at most 512."
    )
    weights: dict[str, Rate] | None = Field(
        None, min_length=1, description="Weight of each domain in the text; null: equal."
    )
    held_out: float = Field(
        0.1, gt=0, le=0.5, description="Held-out share of the sequences, on which each layer's error is measured."
    )
    inputs: Literal["parent", "model"] = Field(
        "parent",
        description="Whose hidden states a layer is trained on: parent (layers are independent) or model (each layer "
        "gets the errors of those before it, one after another).",
    )
    epochs: int = Field(8, ge=1, le=1000, description="Epochs over the tokens.")
    batch: int = Field(512, ge=1, description="Tokens per step.")
    lr: float = Field(
        0.05, gt=0, lt=1, description="Maximum step of a weight, relative to the root mean square of its matrix."
    )
    router: Literal["auto", "trained", "frozen"] = Field(
        "auto",
        description="Whether routers are also trained. auto: frozen if they were fitted on text and are hard, else trained.",
    )
    router_lr: float = Field(0.02, gt=0, lt=1, description="The same as lr, for routers.")
    router_std: float = Field(
        0.25, gt=0, le=100, description="Initial standard deviation over experts of a trained router's logits."
    )
    competitive_epochs: int = Field(
        0,
        ge=0,
        le=1000,
        description="Epochs before the rest in which only the router learns, on which expert is nearest.",
    )
    losses: Annotated[dict[str, Rate], BeforeValidator(_losses)] = Field(
        default_factory=dict, description="Additional losses on the routing by name, with coefficients."
    )
    weighting: Literal["none", "residual"] = Field(
        "residual", description="residual: weight errors relative to the token's residual stream."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Random seed.")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of large products; trained weights are kept in float32."
    )
    device: Device = Field("auto", description="Device: auto (a GPU if there is one), cpu, cuda.")

    @model_validator(mode="after")
    def _consistent(self) -> HealRecipe:
        if self.router == "frozen" and (self.losses or self.competitive_epochs):
            key = "losses" if self.losses else "competitive_epochs"
            raise breaks(key, "they train routers, but router is frozen")
        if self.weights is not None and not any(self.weights.values()):
            raise breaks("weights", "all are zero")
        return self

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide the result: all but the path of the text and the device."""
        return self.model_dump(mode="json", exclude={"text", "device"})


load_heal_recipe = HealRecipe.load
