"""Recipes of ``llamamoe mix``: models, router, and the origin of what all experts share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ...architectures.targets import TARGETS
from ...calibration.compute import MIN_TOKENS
from ...checkpoint.layout import SHARD_SIZE, SHARD_SIZE_RULE
from ...errors import near_misses
from ...recipes import Count, Paths, Recipe, breaks, form


class MixRecipe(Recipe):
    """Everything that decides what ``llamamoe mix`` writes, beside BASE."""

    experts: Paths = Field(
        description="Models whose FFNs become the experts: folders or Hub ids, in the order of the experts.",
    )
    backbone: Literal["base", "average"] | tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        "base",
        description="Attention, norms, embedding and head: base (BASE's), average (over the experts' models, as in "
        "Branch-Train-MiX), or a list of weights for BASE and each expert's model.",
    )
    top_k: int = Field(2, ge=1, description="Models selected per token (k).")
    router: Literal["random", "hidden", "text"] = Field(
        "random",
        description="random: normal rows, to be trained. hidden: from the hidden states of prompts in BASE. text: fitted to a text "
        "of each expert.",
    )
    router_std: float = Field(
        0.02, gt=0, allow_inf_nan=False, description="Standard deviation of the rows of a random router."
    )
    prompts: str | None = Field(None, description="File of the prompts of each expert, for the router hidden.")
    hidden_states: Literal["ffn_input", "layer_input"] = Field(
        "ffn_input",
        description="Which states of prompts: ffn_input (what the router reads) or layer_input (the residual stream before the "
        "layer's attention, as mergekit-moe).",
    )
    hidden_tokens: Literal["mean", "last"] = Field(
        "mean", description="Which tokens of a prompt count: the mean over all, or the last one."
    )
    texts: tuple[Paths, ...] | None = Field(
        None,
        description="Text of each expert, for the router text: a path or a list of paths for every expert, in their order.",
    )
    text_tokens: Annotated[int, Count, Field(ge=MIN_TOKENS, le=2**30)] = Field(
        16384, description="Maximum number of tokens of each expert's text."
    )
    target: str = Field("auto", description="Target architecture in transformers.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of the stored weights; null: BASE's."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Random seed.")
    shard_size: Annotated[str, form(SHARD_SIZE, SHARD_SIZE_RULE)] = Field(
        "5GB", description="Maximum size of one weights file, for example 5GB or 500MB."
    )

    @model_validator(mode="after")
    def _consistent(self) -> MixRecipe:
        count = len(self.experts)
        if count < 2:
            raise breaks("experts", f"a mixture needs at least 2 experts, each with its model (got {count})")
        if self.top_k > count:
            raise breaks("top_k", f"must not exceed the number of experts, {count} (got {self.top_k})")
        if isinstance(self.backbone, tuple) and (len(self.backbone) != 1 + count or not any(self.backbone)):
            weights = f"{1 + count} weights, for BASE and each expert, not all zero (got {list(self.backbone)})"
            raise breaks("backbone", f"give {weights}")
        self._check_router()
        if self.target != "auto" and self.target not in TARGETS:
            known = near_misses(self.target, ["auto", *TARGETS.names()])
            raise PydanticCustomError("target", f"unknown target {self.target!r}. {known}")
        return self

    def _check_router(self) -> None:
        """Refuse a router without what it is made from, and what no router is made from."""
        if self.prompts is not None and self.texts is not None:
            raise breaks("", "--prompts and --text exclude each other: a router is made from prompts or from texts")
        if self.router == "hidden" and self.prompts is None:
            raise breaks("prompts", "the router hidden needs a file of prompts (--prompts)")
        if self.router == "text" and self.texts is None:
            raise breaks("texts", "the router text needs a text of each expert (--text)")
        for key, value, router in (("prompts", self.prompts, "hidden"), ("texts", self.texts, "text")):
            if value is not None and self.router != router:
                raise breaks(key, f"only the router {router} reads them, but the router is {self.router}")
        count = len(self.experts)
        if self.texts is not None and len(self.texts) != count:
            raise breaks("texts", f"give one for each of the {count} experts, in their order (got {len(self.texts)})")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights of BASE and each expert's model in what all experts share; their sum is 1."""
        count = len(self.experts)
        named = {"base": (1.0, *[0.0] * count), "average": (0.0, *[1.0] * count)}
        weights = self.backbone if isinstance(self.backbone, tuple) else named[self.backbone]
        return tuple(weight / sum(weights) for weight in weights)

    def deciding(self) -> dict[str, Any]:
        """Return the keys that decide the result: all but the places of files."""
        return self.model_dump(mode="json", exclude={"experts", "prompts", "texts"})


load_mix_recipe = MixRecipe.load
