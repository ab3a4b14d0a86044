"""Options of alignment: tokens, rates and temperatures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_LENGTH = 256
"""Default number of tokens per sequence."""
_MOST = 2**40
_LARGE, _SMALL = 1e6, 1e-6
"""Upper limit of rates; beyond it float32 holds neither a step nor its square."""
_Rate = Annotated[float, Field(ge=0, le=_LARGE, allow_inf_nan=False)]
_Positive = Annotated[float, Field(ge=_SMALL, le=_LARGE, allow_inf_nan=False)]


class AlignmentOptions(BaseModel):
    """Options of learning through the whole model; see `llamamoe.alignment.align.Alignment`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(262144, ge=1024, le=_MOST, description="Tokens of text to learn from, each read once.")
    length: int | None = Field(
        None, ge=2, description="Tokens of one sequence; null: the model's positions, at most 256."
    )
    batch: int = Field(1024, ge=2, le=_MOST, description="Tokens per step, in whole sequences.")
    lr_assignment: _Rate = Field(
        0.01, description="Highest rate of the assignment's logits; 0 keeps every neuron where it is."
    )
    reach: _Positive = Field(
        0.75,
        description="How far those logits can go at most in all steps together, in units of margin: long runs get a lower rate.",
    )
    lr_router: _Rate = Field(0.002, description="Rate of the router's rows, as a share of their own size.")
    weights: Literal["frozen", "scales", "ffn"] = Field(
        "ffn",
        description="What of the FFN learns, too: frozen: nothing; scales: a factor for each neuron's output; ffn: all three "
        "matrices, which takes 16 bytes of memory for each of their weights.",
    )
    lr_scale: _Rate = Field(0.01, description="Rate of the neurons' factors.")
    lr_weights: float | None = Field(
        None,
        ge=0,
        le=_LARGE,
        allow_inf_nan=False,
        description="Rate of the FFN's matrices, as a share of their own size; null: 1 / hidden_size.",
    )
    tau_start: _Positive = Field(1.0, description="First temperature of the assignment.")
    tau_end: _Positive = Field(0.3, description="Last temperature of the assignment.")
    router_start: _Positive = Field(1.0, description="First temperature of the router, in units of its logits' spread.")
    router_end: _Positive = Field(0.3, description="Last temperature of the router.")
    margin: _Positive = Field(2.0, description="Lead of a neuron's initial place over the others at the start.")
    refresh: int = Field(5, ge=1, le=_MOST, description="Steps between two exact assignments.")
    checks: int = Field(4, ge=1, le=1000, description="States that are compared on held-out text, beside the start.")
