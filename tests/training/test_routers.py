"""Assumptions of gates and losses about the native routers of transformers hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llamamoe.architectures.targets import TARGETS
from llamamoe.errors import CheckpointError
from llamamoe.training.gates.selection import ranked_TN, weights_Tk
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.routing import RouterTap, Routing

from .tiny_moe import ARCHITECTURES, COMMON, H, N, fake_layer, input_ids, tiny_moe


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("renormalised", [True, False])
def test_selection_and_weights_are_the_native_ones(name: str, renormalised: bool) -> None:
    keys = {"norm_topk_prob": renormalised} if name in ("qwen2_moe", "qwen3_moe", "glm4_moe") else {}
    for moe in find_moe_layers(tiny_moe(name, **keys)):
        if moe.correction_bias is not None:
            moe.correction_bias.copy_(torch.linspace(-0.2, 0.2, N).view_as(moe.correction_bias))
        logits, weights, indices = moe.decisions(moe.router(torch.randn(50, H)))
        chosen = ranked_TN(moe, logits).topk(moe.top_k, dim=-1)[1]
        assert torch.equal(chosen.sort(-1)[0], indices.sort(-1)[0])
        torch.testing.assert_close(weights_Tk(moe, logits, indices).to(weights.dtype), weights, rtol=1e-6, atol=0)


def test_groups_of_experts_are_shut_out_as_the_native_router_does() -> None:
    moe = find_moe_layers(tiny_moe("glm4_moe", n_group=3, topk_group=1))[0]
    logits, _, indices = moe.router(torch.randn(50, H))
    ranked = ranked_TN(moe, logits)
    assert torch.equal(ranked.topk(2, dim=-1)[1].sort(-1)[0], indices.sort(-1)[0])
    assert torch.equal(ranked.isfinite().sum(-1), torch.full((50,), 2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tap_records_logits_with_a_gradient_and_forgets_nothing_under_checkpointing(name: str) -> None:
    model = tiny_moe(name)
    if name != "jetmoe":  # its class does not support it
        model.activation_checkpointing_enable()
    layers = find_moe_layers(model)
    tap = RouterTap(layers)
    with tap.armed(inputs=True) as routings:
        model(input_ids=input_ids(), use_cache=False)
    assert [(r.moe.place, r.num_tokens) for r in routings] == [(moe.place, 24) for moe in layers]
    assert all(r.inputs_TH is not None and r.inputs_TH.shape == (24, H) for r in routings)
    sum(r.probabilities_TN[:, 0].sum() for r in routings).backward()
    assert all(float(r.moe.router_NH.grad.norm()) > 0 for r in routings)


def test_dropped_assignments_count_as_wanted_only() -> None:
    logits = torch.zeros(2, 3)
    routing = Routing(
        fake_layer(3),
        logits,
        torch.ones(2, 2),
        torch.tensor([[0, 1], [0, 2]]),
        dropped_Tk=torch.tensor([[False, False], [True, False]]),
        wanted_Tk=torch.tensor([[0, 1], [0, 1]]),
    )
    assert routing.counts_N().tolist() == [1, 1, 1]
    assert routing.wanted_counts_N().tolist() == [2, 2, 0]


@pytest.mark.parametrize("renormalised", [True, False])
def test_the_router_of_a_target_from_elsewhere_is_understood(
    monkeypatch: pytest.MonkeyPatch, renormalised: bool
) -> None:
    class Dots1(TARGETS.get("glm4_moe")):  # type: ignore[misc]
        name = "dots1"

    keys = {"n_routed_experts": N, "moe_intermediate_size": 8, "intermediate_size": 8, "n_shared_experts": 1}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("dots1", **COMMON, **keys, norm_topk_prob=renormalised, routed_scaling_factor=3.0)
    )
    with pytest.raises(CheckpointError, match="Dots1TopkRouter: how this router weighs its experts is not known"):
        find_moe_layers(model)
    monkeypatch.setitem(TARGETS._found, "dots1", Dots1)
    moe = find_moe_layers(model)[0]
    moe.router_NH.data.normal_(generator=torch.Generator().manual_seed(0))
    logits, weights, indices = moe.router(torch.randn(50, H))
    torch.testing.assert_close(weights_Tk(moe, logits, indices), weights)
