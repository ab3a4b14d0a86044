"""Count what a model costs: parameters in total and per token, multiply-adds, bytes; part by part.

Every stored parameter is *total*. Of the *active* ones a routed expert's count k/N, and an input embedding only if it
is the output head, too: otherwise a token reads one row of it. So a tied model and one with the same head written out
have the same number. (Mixtral's 12.9 B include its embedding; here they are 12.7 B.) FLOPs are two per weight that a
token is multiplied with; attention scores, which depend on the context's length, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PARTS = (
    "embedding", "attention", "routed_attention", "norm", "router", "routed", "shared", "stub", "dense_ffn", "head"
)  # fmt: skip

_ROLES = (
    (r"embed_tokens", "embedding"),
    (r"lm_head", "head"),
    (r"self_attention\.experts\.(input|output)_linear", "routed_attention"),
    (r"(^|\.)(mlp|block_sparse_moe)\.(experts\.|(input|output)_linear)", "routed"),
    (r"\.shared_experts?\.|shared_mlp\.|\.mlp\.bias$", "shared"),
    (
        r"(mlp|block_sparse_moe|self_attention\.experts)\.(gate|router)\.|moe_statics|shared_expert_gate|e_score_correction_bias",
        "router",
    ),
    (r"norm", "norm"),
    (r"(self_(attn|attention)|linear_attn)\.", "attention"),
    (r"\.mlp\.", "dense_ffn"),
)


def role_of(name: str) -> str:
    """Return the part that a tensor of a dense or converted checkpoint belongs to, by its name."""
    return next((role for pattern, role in _ROLES if re.search(pattern, name)), "other")


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-adds of a model.

    Attributes:
        total: Stored parameters per part.
        active: Parameters that one token uses, per part; 0 for an embedding that is only looked up.
        flops_per_token: Floating-point operations of one token's forward pass without attention scores.
        nbytes: Bytes of all tensors as stored.
    """

    total: dict[str, int]
    active: dict[str, int]
    flops_per_token: int
    nbytes: int

    @property
    def total_parameters(self) -> int:
        """Total parameters, summed over the parts."""
        return sum(self.total.values())

    @property
    def active_parameters(self) -> int:
        """Active parameters, summed over the parts."""
        return sum(self.active.values())

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON-compatible data."""
        return {
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "flops_per_token": self.flops_per_token,
            "bytes": self.nbytes,
            "parts": {p: {"total": self.total[p], "active": self.active[p]} for p in self.total},
        }


def count(
    tensors: Iterable[tuple[str, tuple[int, ...], int]], *, active_share: float = 1.0, tied: bool = False
) -> Cost:
    """Return the cost of a model from its tensors.

    Args:
        tensors: (role, shape, bytes) of every tensor.
        active_share: k/N, the share of the routed experts that one token uses.
        tied: Whether the embedding table also serves as the output head.
    """
    total: dict[str, int] = {}
    matrices: dict[str, int] = {}
    nbytes = 0
    for role, shape, size in tensors:
        numel = 1
        for n in shape:
            numel *= n
        total[role] = total.get(role, 0) + numel
        nbytes += size
        if len(shape) > 1 and role != "embedding":
            matrices[role] = matrices.get(role, 0) + numel
    if tied:
        matrices["head"] = total.get("embedding", 0)
    share: Mapping[str, float] = {"routed": active_share, "routed_attention": active_share, "embedding": float(tied)}
    active = {role: round(n * share.get(role, 1.0)) for role, n in total.items()}
    flops = sum(round(2 * n * share.get(role, 1.0)) for role, n in matrices.items())
    order = sorted(total, key=lambda r: PARTS.index(r) if r in PARTS else len(PARTS))
    return Cost({r: total[r] for r in order}, {r: active[r] for r in order}, flops, nbytes)
