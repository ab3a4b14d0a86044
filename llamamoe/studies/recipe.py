"""Recipes of studies: methods, budgets, seeds and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..conversion.recipe import (
    AUTO,
    CalibrationLength,
    CalibrationText,
    CalibrationTokens,
    CalibrationWeights,
    Device,
    SplitRecipe,
    build_recipe,
)
from ..errors import near_misses, problem_lines
from ..methods.selectors import SELECTORS
from ..methods.splitters import SPLITTERS
from ..recipes import Choice, Count, Paths, Recipe, breaks, choose, explain, form
from .budget.sensitivities import SENSITIVITIES

DENSE, RANDOM, STATIC, ORACLE = "dense", "random", "static", "oracle router"
"""Names of the controls."""
BY_LAYER = "k by layer"
"""End of the name of a method whose layers differ in k."""
SIZES = ("num_experts", "top_k", "shared", "pad_to")
_STUDY = ("calibration", "calibration_tokens", "calibration_weights", "calibration_length", "compute_dtype", "device",
          "seed", "shard_size", "card", "strict")  # fmt: skip
"""Keys of a split's recipe that the study sets for all its methods."""

Budget = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class StudyMethod(BaseModel):
    """One entry of ``methods``: a name, and keys of a split's recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[
        str,
        form(r"[^/\\|\x00-\x1f]{1,60}", "must have 1 to 60 characters, none of them /, \\, | or a control character"),
    ] = Field(description="Name in the table.")
    shared_of_active: float | None = Field(None, ge=0, lt=1, description="Overrides the study's.")
    budgets: tuple[Budget, ...] | None = Field(None, description="Overrides the study's.")
    top_k_by_layer: str | None = Field(
        None,
        description="Also simulate the method with a k for each layer under the same total, by the losses of this "
        "measure of budget (proxy, kl); `split` writes one k.",
    )
    sizes: dict[Budget, dict[str, Any]] = Field(
        default_factory=dict, description="num_experts, top_k, shared and pad_to at given budgets."
    )
    recipe: dict[str, Any] = Field(default_factory=dict, description="Keys of a recipe for split.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """Accept a method's name, or a mapping in which keys of a split's recipe are mixed with the entry's own."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or "recipe" in value:
            return value
        own = {key: value[key] for key in cls.model_fields if key in value}
        recipe = {str(key): each for key, each in value.items() if key not in own}
        if "method" not in recipe and own.get("name") in SPLITTERS:
            recipe["method"] = own["name"]
        return own | {"recipe": recipe}

    @model_validator(mode="after")
    def _valid(self) -> StudyMethod:
        lines = [f"{key} is decided by the study" for key in self.recipe if key in _STUDY]
        known = [*type(self).model_fields, *SplitRecipe.model_fields]
        unknown = [key for key in self.recipe if key not in SplitRecipe.model_fields]
        lines += [f"{key}: unknown key. {near_misses(key, [k for k in known if k not in _STUDY])}" for key in unknown]
        if "method" not in self.recipe:
            lines.append(f"does not name a method. {near_misses(self.name, SPLITTERS.names())}")
        for budget, sizes in self.sizes.items():
            wrong = [key for key in sizes if key not in SIZES]
            lines += [f"sizes.{budget:g}.{key}: unknown key. {near_misses(key, list(SIZES))}" for key in wrong]
        if not lines:
            for sizes in [{}, *self.sizes.values()]:
                try:
                    SplitRecipe.model_validate(self.recipe | sizes)
                except ValidationError as error:
                    lines += problem_lines(explain(error, SplitRecipe))
        lines += [] if lines else self._by_layer()
        if lines:
            raise PydanticCustomError("choice", "; ".join(f"{self.name}: {line}" for line in dict.fromkeys(lines)))
        return self

    def _by_layer(self) -> list[str]:
        """Return what is wrong with `top_k_by_layer`."""
        measure = self.top_k_by_layer
        if measure is None:
            return []
        if measure not in SENSITIVITIES:
            return [f"top_k_by_layer: unknown measure {measure!r}. {near_misses(measure, SENSITIVITIES.names())}"]
        name = self.split_recipe().method.name
        if name in SPLITTERS and not SPLITTERS.get(name).routed:
            return [f"top_k_by_layer: {name} has no experts"]
        return [
            f"top_k_by_layer measures one layer at a time, so {key} is not possible beside it"
            for key in ("align", "keep_dense")
            if self.recipe.get(key)
        ]

    def split_recipe(self, **more: Any) -> SplitRecipe:
        """Return a complete recipe; ``more`` overrides keys."""
        return build_recipe(self.recipe | more)


class CompareRecipe(Recipe):
    """Everything that decides what ``llamamoe compare`` measures."""

    methods: tuple[StudyMethod, ...] = Field(description="The methods to compare.")
    evaluation: Paths = Field(min_length=1, description="Text to measure perplexity on: files, folders or globs.")
    evaluation_tokens: Annotated[int, Field(ge=2), Count] | None = Field(
        8192, description="Maximum number of tokens per domain; null: all."
    )
    context_length: Annotated[int, Field(ge=2), Count] | None = Field(
        None, description="Tokens per window; null: the model's, at most 2048."
    )
    calibration: CalibrationText = ()
    calibration_tokens: CalibrationTokens = 65536
    calibration_weights: CalibrationWeights = None
    calibration_length: CalibrationLength = None
    budgets: tuple[Budget, ...] = Field(
        (0.5,),
        description="Maximum active multiply-adds of the FFN per token, as shares of the dense FFN's.",
    )
    seeds: tuple[Seed, ...] | dict[Budget, tuple[Seed, ...]] = Field(
        (0,), description="Random seeds; a mapping sets them per budget."
    )
    shared_of_active: float = Field(0.5, ge=0, lt=1, description="Share of the active neurons that are shared.")
    controls: bool = Field(
        True, description="Add controls: dense, random, static pruning, and each method with an oracle router."
    )
    static_by: Annotated[Choice, choose(SELECTORS)] = Field(
        Choice(name="power"),
        validate_default=True,
        description="The selector of the neurons that static pruning keeps.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype in which the models are measured.")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of large products of a calibration; null: as in dtype."
    )
    device: Device = Field("auto", description="Device: auto, cpu, cuda, cuda:1, ...")
    batch_size: int = Field(8, ge=1, description="Number of windows per batch.")
    speed: tuple[Literal["transformers", "llama.cpp"], ...] = Field(
        (), description="Programs in which the speed of every shape, dense and static pruning is measured."
    )
    speed_shape: Literal["1B", "source"] = Field(
        "1B", description="The model for measuring speeds: one of random weights of this size, or the source."
    )
    export: Literal["none", "first", "all"] = Field(
        "none", description="Also write and measure checkpoints: of the first cell of each method, or of all."
    )

    @model_validator(mode="after")
    def _consistent(self) -> CompareRecipe:
        names = [method.name for method in self.methods]
        if not names or not self.budgets:
            raise breaks("budgets" if names else "methods", "there are none")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise breaks("methods", f"the name {twice[0]!r} appears twice")
        if isinstance(self.seeds, dict):
            known = {*self.budgets, *(b for method in self.methods for b in method.budgets or ())}
            for budget in sorted(known):
                if not self.seeds.get(budget):
                    raise breaks("seeds", f"there are none for the budget {budget:g}")
        elif not self.seeds:
            raise breaks("seeds", "there are none")
        if AUTO in self.calibration and len(self.calibration) > 1:
            raise breaks("calibration", "'auto' (sampled text) cannot be mixed with files")
        return self

    def unused_sizes(self) -> tuple[str, ...]:
        """Return a sentence for each method with sizes at a budget that it does not have."""
        budgets = {method.name: method.budgets or self.budgets for method in self.methods}
        return tuple(
            f"the sizes of {method.name} at budget {budget:g} are not used: it is measured at {', '.join(f'{b:g}' for b in budgets[method.name])}"
            for method in self.methods
            for budget in method.sizes
            if budget not in budgets[method.name]
        )

    def seeds_of(self, budget: float) -> tuple[int, ...]:
        """Return the seeds at one budget."""
        return self.seeds[budget] if isinstance(self.seeds, dict) else self.seeds

    def calibrated(self) -> dict[str, Any]:
        """Return the keys of a split's recipe that the study sets for all methods that need text."""
        return {
            "calibration": self.calibration,
            "calibration_tokens": self.calibration_tokens,
            "calibration_weights": self.calibration_weights,
            "calibration_length": self.calibration_length,
            "compute_dtype": self.compute_dtype or self.dtype,
            "device": self.device,
        }


load_compare_recipe = CompareRecipe.load
