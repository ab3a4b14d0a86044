"""Convert the attention of one layer: a router over its query heads."""

from __future__ import annotations

from ..lazy import np, torch
from ..methods.router_scale import scale_router
from .assembly import router_dtype
from .plan import SplitPlan

_STD = 0.02
"""Standard deviation of random rows, as in `llamamoe.methods.routers.random`."""


def attention_rows(plan: SplitPlan, layer: int, rng: np.random.Generator) -> torch.Tensor | None:
    """Return the rows of the attention's router, float32 ``[N, H]`` as they will be stored; None if attention is dense.

    They are random, to be trained: weights alone do not tell which heads a token needs.
    """
    if not plan.target.attention_experts:
        return None
    shape = (plan.layout.num_experts, plan.model.spec.hidden_size)
    rows_NH = torch.from_numpy(rng.normal(0.0, _STD, shape)).float()
    norm_H = plan.model.read(f"model.layers.{layer}.input_layernorm.weight")
    return scale_router(rows_NH, norm_H, plan.recipe.router_scale, router_dtype(plan.tensors, plan.dtype)).rows_NH
