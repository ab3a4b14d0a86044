"""Options of alignment: tokens, rates and temperatures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..recipes import Count

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

    tokens: Annotated[int, Count] = Field(
        262144, ge=1024, le=_MOST, description="Number of training tokens, each read once."
    )
    length: Annotated[int, Field(ge=2), Count] | None = Field(
        None, description="Tokens per sequence; null: the model's context length, at most 256."
    )
    batch: int = Field(1024, ge=2, le=_MOST, description="Tokens per step, in whole sequences.")
    lr_assignment: _Rate = Field(0.01, description="Learning rate of the assignment logits; 0: no neuron moves.")
    reach: _Positive = Field(
        0.75,
        description="Maximum total change of these logits, in units of margin; lowers the rate of long runs.",
    )
    lr_router: _Rate = Field(0.002, description="Learning rate of the router, relative to the size of its rows.")
    weights: Literal["frozen", "scales", "ffn"] = Field(
        "ffn",
        description="FFN weights to train: frozen: none; scales: a factor per neuron; ffn: all three "
        "matrices, which takes 16 bytes of memory for each of their weights.",
    )
    lr_scale: _Rate = Field(0.01, description="Learning rate of the factors per neuron.")
    lr_weights: float | None = Field(
        None,
        ge=0,
        le=_LARGE,
        allow_inf_nan=False,
        description="Learning rate of the FFN matrices, relative to their size; null: 1 / hidden_size.",
    )
    tau_start: _Positive = Field(1.0, description="Initial temperature of the assignment.")
    tau_end: _Positive = Field(0.3, description="Final temperature of the assignment.")
    router_start: _Positive = Field(
        1.0, description="Initial temperature of the router, in units of the spread of its logits."
    )
    router_end: _Positive = Field(0.3, description="Final temperature of the router.")
    margin: _Positive = Field(2.0, description="Lead of a neuron's initial place over the others at the start.")
    refresh: int = Field(5, ge=1, le=_MOST, description="Steps between two exact assignments.")
    checks: int = Field(
        4, ge=1, le=1000, description="Number of states compared on held-out text, in addition to the start."
    )

    def learns(self, *, router: bool) -> bool:
        """Return whether any rate is above 0.

        Args:
            router: Whether there is a router to train.
        """
        weights = {"frozen": 0.0, "scales": self.lr_scale, "ffn": 1.0 if self.lr_weights is None else self.lr_weights}
        return self.lr_assignment > 0 or (router and self.lr_router > 0) or weights[self.weights] > 0
