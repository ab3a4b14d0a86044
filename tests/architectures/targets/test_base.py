"""The factor of every target and rescale: router weight times factor is the coefficient that was asked for."""

from __future__ import annotations

import pytest
import torch

from llamamoe.architectures.rescales import RESCALES
from llamamoe.architectures.targets import TARGETS

SIZES = [(8, 2), (4, 4), (6, 1), (16, 5)]


def router_weight(weighting: str, num_experts: int, top_k: int) -> float:
    """Return the weight of one selected expert when all logits are zero, written out."""
    logits = torch.zeros(num_experts, dtype=torch.float64)
    if weighting == "renormalised":
        chosen = logits.softmax(0)[:top_k]
        return float((chosen / chosen.sum())[0])
    return float(logits.softmax(0)[0] if weighting == "softmax" else logits.sigmoid()[0])


@pytest.mark.parametrize("target", TARGETS.names())
@pytest.mark.parametrize("rescale", RESCALES.names())
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_weight_times_factor_is_the_coefficient(target: str, rescale: str, num_experts: int, top_k: int) -> None:
    rule = RESCALES.get(rescale)()
    found = TARGETS.get(target)().combine(rule, num_experts, top_k)
    assert found.weighting in TARGETS.get(target).weightings
    for k in range(1, num_experts + 1) if found.any_k else [top_k]:
        weight = router_weight(found.weighting, num_experts, k)
        assert weight * found.factor == pytest.approx(rule.coefficient(num_experts, k), rel=1e-12)
    at_all = router_weight(found.weighting, num_experts, num_experts) * found.factor
    assert at_all * found.parity_factor == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("target", "rescale", "weighting", "factor", "baked", "any_k"),
    [
        ("mixtral", "dropout", "renormalised", 8, 8, True),
        ("mixtral", "unit", "renormalised", 2, 2, False),
        ("mixtral", "llama_moe", "renormalised", 4, 4, False),
        ("qwen2_moe", "dropout", "renormalised", 8, 8, True),
        ("qwen2_moe", "unit", "softmax", 8, 8, True),
        ("qwen3_moe", "unit", "softmax", 8, 8, True),
        ("glm4_moe", "dropout", "renormalised", 8, 1, True),
        ("glm4_moe", "unit", "sigmoid", 2, 1, True),
        ("granitemoeshared", "unit", "renormalised", 2, 2, False),
        ("ernie4_5_moe", "dropout", "renormalised", 8, 8, True),
    ],
)
def test_the_agreed_spellings(
    target: str, rescale: str, weighting: str, factor: float, baked: float, any_k: bool
) -> None:
    """The table of the design for 2 of 8 experts."""
    found = TARGETS.get(target)().combine(RESCALES.get(rescale)(), 8, 2)
    assert (found.weighting, found.factor, found.bake, found.any_k) == (weighting, factor, baked, any_k)
