"""Estimate what it costs to convert attention on calibration text: operations and memory (see `.attention`)."""

from __future__ import annotations

from ..architectures.sources.base import DenseSpec
from ..methods.layer import BATCH_TOKENS
from .recipe import SplitRecipe

SOLUTIONS = 6
"""Assumed number of solutions of the repair, whose strength is searched for."""


def fits_router(recipe: SplitRecipe) -> bool:
    """Return whether attention's router is fitted where there is text."""
    return recipe.router is not None and recipe.router.name != "random"


def attention_flops(spec: DenseSpec, recipe: SplitRecipe, num_experts: int, tokens: int, dense: int) -> int:
    """Return the floating-point operations for the attention of one layer, beside the walk's own pass.

    Heads are computed again in every pass: for its inputs, the router, the repair, and the error before and after it.
    The router sums ``H (H + N)`` numbers per token, the error two outputs, the repair one, and ``Q (Q + H)`` numbers. Each
    pass but the repair's takes every expert's contribution, ``Q^2 / N``. Logits are ``H N``, once or twice in a pass.

    Args:
        spec: The model.
        recipe: The recipe.
        num_experts: N.
        tokens: Number of tokens.
        dense: Operations of a pass through dense attention.
    """
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    output, contributions = 2 * heads * hidden, 2 * heads * heads // num_experts
    errors = 1 + recipe.repairs
    per_token = errors * (2 * output + contributions) + (2 + 2 * errors + recipe.repairs) * 2 * hidden * num_experts
    if fits_router(recipe):
        per_token += 2 * hidden * (hidden + num_experts) + contributions
    solve = 0
    if recipe.repairs:
        per_token += 2 * output + 2 * heads * heads
        solve = SOLUTIONS * (heads**3 // 3 + 4 * heads * heads * hidden)
    passes = 1 + errors + fits_router(recipe) + recipe.repairs
    return passes * dense + tokens * per_token + solve


def attention_bytes(spec: DenseSpec, recipe: SplitRecipe) -> int:
    """Estimate the memory beside the layer's own: sums in float64 of repair or router, and a batch through it."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    sums = 8 * heads * (4 * heads + 5 * hidden) if recipe.repairs else 8 * hidden * 4 * hidden
    return 4 * 3 * heads * hidden + sums + 4 * BATCH_TOKENS * (6 * heads + 2 * hidden)
