"""Count what the alignment of a recipe takes, from headers alone."""

from __future__ import annotations

from ..alignment.cost import AlignmentPlan, plan_alignment
from ..alignment.recipe import MAX_LENGTH
from ..architectures.moe_layout import MoeLayout
from ..architectures.sources.base import DenseSpec
from ..errors import RefusedError
from .calibration_cost import sequence_length
from .recipe import SplitRecipe


def with_length(spec: DenseSpec, recipe: SplitRecipe) -> SplitRecipe:
    """Return the recipe with the length of alignment's sequences.

    Raises:
        RefusedError: They are longer than the model's positions, or the tokens give fewer than two of them.
    """
    options = recipe.align
    if options is None:
        return recipe
    length = sequence_length(options.length, MAX_LENGTH, spec, "align.length", "align.length")
    if options.tokens < 2 * length:
        raise RefusedError(
            f"--align-tokens {options.tokens} makes one sequence of {length} tokens, but two are needed: one is held out.",
            hint=f"Use at least {2 * length}, or shorter sequences (--set align.length={options.tokens // 2}).",
        )
    return recipe.model_copy(update={"align": options.model_copy(update={"length": length})})


def alignment_cost(spec: DenseSpec, recipe: SplitRecipe, layout: MoeLayout, source_dtype: str) -> AlignmentPlan | None:
    """Return the cost of the recipe's alignment."""
    options = recipe.align
    if options is None:
        return None
    dtype, half_source = recipe.compute_dtype, source_dtype in ("BF16", "F16")
    # without a dtype, only torch can tell whether "auto" finds a processor that is fast in bfloat16
    half = dtype == "bfloat16" or (dtype is None and half_source and recipe.device.startswith("cuda"))
    return plan_alignment(
        spec,
        options,
        layers=spec.num_layers - len(layout.dense_layers),
        num_experts=layout.num_experts,
        compute_bytes=2 if half else 4,
    )
