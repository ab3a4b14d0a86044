"""Recipes of conversions: validated, completed and written next to the result.

A recipe is YAML or keyword arguments. All errors are reported at once, with suggestions for misspelled names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..alignment.recipe import AlignmentOptions
from ..architectures.rescales import RESCALES
from ..architectures.targets import TARGETS
from ..calibration.compute import MIN_TOKENS
from ..checkpoint.layout import SHARD_SIZE, SHARD_SIZE_RULE
from ..errors import near_misses
from ..methods.repairs import REPAIRS
from ..methods.routers import ROUTERS
from ..methods.selectors import SELECTORS
from ..methods.splitters import SPLITTERS
from ..recipes import Choice, Count, Paths, Recipe, breaks, choose, form, validated

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of dtypes in recipes, and in safetensors headers."""
AUTO = "auto"
"""The method that the plan chooses; the calibration text that is sampled from the parent."""
NO_REPAIR = "none"
ONE_SIZE = (
    "must be one number for all layers: config.json holds one, and padding a smaller layer with zeros costs as much as neurons "
    "do (keep_dense chooses dense layers; compare simulates a k for each layer, by its key top_k_by_layer)"
)


Device = Annotated[str, form(r"auto|[a-z]+(:[0-9]+)?", "must be auto or a device such as cpu, cuda or cuda:1")]


CalibrationText = Annotated[
    Paths,
    Field(description="Calibration text: files, folders or globs; 'auto' samples it from the source."),
]
CalibrationTokens = Annotated[
    int, Count, Field(ge=MIN_TOKENS, le=2**40, description="Maximum number of calibration tokens.")
]
CalibrationWeights = Annotated[
    dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None,
    Field(min_length=1, description="Weight of each domain in the calibration text; null: equal."),
]
CalibrationLength = Annotated[
    Annotated[int, Field(ge=2), Count] | None, Field(description="Tokens per calibration sequence.")
]


def _one_for_all(value: Any) -> Any:
    """Refuse a size for each layer, with the reason."""
    if isinstance(value, list | tuple | Mapping):
        raise PydanticCustomError("by_layer", ONE_SIZE)
    return value


OneSize = BeforeValidator(_one_for_all)
"""Refuses a list where a size is one number for all layers."""


def _shared_size(value: Any) -> Any:
    """Validate a share (0 <= x < 1), a count (0, 1, 2, ...) or a number of expert widths (``"2x"``)."""
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}x?|[0-9]*\.[0-9]+(e-?[0-9]+)?|[0-9]+e-[0-9]+", text):
        shown = repr(value) if text else f"a {type(value).__name__}"
        raise PydanticCustomError(
            "shared", f"{shown} is not a share (0.25), a count (384) or a number of expert widths ('2x')"
        )
    if text.endswith("x"):
        return text
    if "." in text or "e" in text:
        if float(text) >= 1:
            raise PydanticCustomError("shared", f"the share {text} must be below 1; a count has no decimal point")
        return float(text)
    return int(text)


class SplitRecipe(Recipe):
    """Everything that decides what ``llamamoe split`` writes. Options left at null are chosen by the plan."""

    num_experts: Annotated[int, OneSize] = Field(8, ge=2, le=4096, description="Routed experts per layer (N).")
    top_k: Annotated[int, OneSize] = Field(2, ge=1, description="Experts selected per token (k).")
    prefer: Literal["quality", "balanced", "speed"] | None = Field(
        None,
        description="Goal for choosing sizes that are not given, from measurements: quality (many narrow experts), speed (few "
        "wide ones, more shared neurons), or balanced.",
    )
    active: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the FFN's neurons that a token uses, shared ones included, from which top_k follows.",
    )
    method: Annotated[Choice, choose(SPLITTERS, AUTO)] = Field(
        Choice(name=AUTO), validate_default=True, description="How neurons are partitioned."
    )
    shared: Annotated[
        float | int | str | None, BeforeValidator(lambda v: None if v is None else _shared_size(v)), OneSize
    ] = Field(None, description="Neurons that every token uses: a share, a count, or '2x' expert widths.")
    shared_by: Annotated[Choice | None, choose(SELECTORS)] = Field(
        None, description="How the shared neurons are chosen."
    )
    router: Annotated[Choice | None, choose(ROUTERS)] = Field(None, description="How the router is initialised.")
    router_scale: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: scale the router down so that selected experts get equal weights; soft: keep its scale.",
    )
    rescale: Annotated[Choice | None, choose(RESCALES)] = Field(
        None, description="Rule for the factor on a selected expert's output."
    )
    repair: Annotated[Choice | None, choose(REPAIRS)] = Field(
        None, description="How weights are refitted to the dense output on calibration text."
    )
    repair_passes: int = Field(
        1, ge=1, le=4, description="Number of repair passes; the router is refitted between passes."
    )
    calibration: CalibrationText = ()
    calibration_tokens: CalibrationTokens = 65536
    calibration_weights: CalibrationWeights = None
    calibration_length: CalibrationLength = None
    align: AlignmentOptions | None = Field(
        None,
        description="Learn partition, router and FFN weights of all layers jointly, by distillation from the parent.",
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of large products on calibration text; stored weights are not rounded to it."
    )
    device: Device = Field(
        "auto", description="Where calibration runs: auto (a GPU if there is one), cpu, cuda or cuda:1"
    )
    target: str = Field("auto", description="Target architecture in transformers.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of the stored weights; null: the source's."
    )
    pad_to: int | None = Field(
        None,
        ge=8,
        le=4096,
        multiple_of=8,
        description="Expert width is padded to a multiple of this with zero neurons; null takes 32, which quantisers require, "
        "where it costs less than 3 %, else 8.",
    )
    keep_dense: tuple[int, ...] = Field((), description="Layers to leave dense; negative numbers count from the end.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Random seed.")
    shard_size: Annotated[str, form(SHARD_SIZE, SHARD_SIZE_RULE)] = Field(
        "5GB", description="Maximum size of one weights file, for example 5GB or 500MB."
    )
    require: Literal["4.57", "megatron", "automodel"] | None = Field(
        None,
        description="Take only what this program computes exactly: transformers 4.57, Megatron-Bridge or NeMo AutoModel.",
    )
    strict: bool = Field(
        False, description="Turn warnings into refusals, including the one about weights that are not finite."
    )
    card: bool = Field(True, description="Write a model card.")

    @model_validator(mode="after")
    def _consistent(self) -> SplitRecipe:
        if self.active is not None and "top_k" in self.model_fields_set:
            raise breaks("active", "top_k (--top-k) is given, too: give one of the two")
        chosen = self.prefer is not None or (self.method.name == AUTO and bool(self.calibration))
        if self.top_k > self.num_experts and not (chosen and "num_experts" not in self.model_fields_set):
            more = "" if "num_experts" in self.model_fields_set else ", its default: give num_experts (--experts), too"
            raise PydanticCustomError(
                "top_k", f"top_k = {self.top_k} must not exceed num_experts = {self.num_experts}{more}"
            )
        if AUTO in self.calibration and len(self.calibration) > 1:
            raise breaks("calibration", "'auto' (sampled text) cannot be mixed with files")
        if AUTO in self.calibration and self.calibration_weights is not None:
            raise breaks("calibration_weights", "sampled text has no domains")
        if self.calibration_weights is not None and not any(self.calibration_weights.values()):
            raise breaks("calibration_weights", "all are zero")
        if self.target != "auto" and self.target not in TARGETS:
            raise breaks(
                "target", f"unknown target {self.target!r}. " + near_misses(self.target, ["auto", *TARGETS.names()])
            )
        return self

    @property
    def repairs(self) -> bool:
        """True if a repair is named, so that weights are fitted layer by layer."""
        return self.repair is not None and self.repair.name != NO_REPAIR

    @property
    def fits(self) -> bool:
        """True if weights become different from the parent's: by repair, or learned in alignment."""
        return self.repairs or (self.align is not None and self.align.weights != "frozen")


def build_recipe(data: Mapping[str, Any]) -> SplitRecipe:
    """Validate a mapping and complete it with defaults.

    Raises:
        UsageError: The recipe is invalid; the message names every error.
    """
    return validated(SplitRecipe, data)


load_recipe = SplitRecipe.load
