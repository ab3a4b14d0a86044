"""Check weights before `heal` starts. Reads tensors, so it is not imported by plans."""

from __future__ import annotations

from collections.abc import Iterator

from ..calibration.walk import read_ffn
from ..errors import RefusedError
from ..lazy import torch
from ..methods.router_scale import is_hard
from .plan import HealPlan

_NORMS = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")


def hard_layers(plan: HealPlan) -> list[int]:
    """Return the layers with hard routers, whose experts get equal weights. Reads routers and norms only."""
    found = []
    for layer in plan.layers:
        rows_NH = plan.checkpoint.read(plan.router_name(layer))
        norm_H = (
            read_ffn(plan.dense, layer).norm_H
            if plan.dense.spec.post_norm
            else plan.dense.spec.norm_weight(plan.checkpoint.read(f"model.layers.{layer}.{plan.dense.spec.ffn_norm}"))
        )
        if is_hard(rows_NH, norm_H):
            found.append(layer)
    return found


def renormalises(plan: HealPlan) -> bool:
    """Return whether routers must be made to renormalise before they are scaled up.

    Raises:
        RefusedError: Only some must be scaled up, so that no single configuration is right for all.
    """
    plain = plan.checkpoint.config.get("norm_topk_prob") is False
    hard = hard_layers(plan) if plain and plan.recipe.router == "trained" else []
    if not hard:
        return False
    if len(hard) < len(plan.layers):
        raise RefusedError(
            f"MODEL's routers do not renormalise their weights, and only those of layers {hard} are hard: scaling them up "
            "would change the others' outputs.",
            hint="Leave routers as they are: --set router=frozen.",
        )
    return True


def differences(plan: HealPlan) -> Iterator[str]:
    """Warn if MODEL's norms and attention differ from its parent's, so that its FFNs get other inputs."""
    other = []
    parts = _NORMS if plan.target.attention_experts else (*_NORMS, "self_attn.o_proj", "linear_attn.out_proj")
    for layer in range(plan.num_layers):
        for part in parts:
            name = f"model.layers.{layer}.{part}.weight"
            if not plan.dense.has(name):
                continue
            mine = plan.checkpoint.read(name)
            theirs = plan.dense.read(name)[: len(mine)].to(mine.dtype)
            if mine.shape != theirs.shape or not torch.allclose(mine.float(), theirs.float(), rtol=1e-2, atol=1e-6):
                other.append(layer)
                break
    if other:
        yield (
            f"norms or attention of {len(other)} layers differ from the parent's, the first is layer {other[0]}: MODEL was "
            "trained, and layers are healed on hidden states that differ from its own"
        )
