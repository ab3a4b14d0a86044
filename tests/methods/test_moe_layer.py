"""The converted layer as a function: against loops, plain formulas and transformers' own classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Glm4MoeConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from llamamoe.architectures.targets import TARGETS
from llamamoe.methods.layer import ExpertWeights, LayerInputs
from llamamoe.methods.moe_layer import ConvertedFfn, dense_outputs
from tests.converted import (
    EXPERTS,
    HIDDEN,
    SHARED,
    TOP_K,
    WIDTH,
    make_ffn,
    make_inputs,
    make_moe,
    make_partition,
    plain_dense,
    plain_expert_weights,
    plain_hidden,
    plain_weighted_hidden,
)

WEIGHTINGS = [
    ("hard", "renormalised", 2.0),
    ("hard", "renormalised", 4.0),
    ("hard", "softmax", 4.0),
    ("hard", "sigmoid", 2.0),
    ("soft", "renormalised", 2.0),
    ("soft", "softmax", 4.0),
    ("soft", "sigmoid", 1.5),
    ("soft", "sigmoid_renormalised", 3.0),
]


def all_of(batches: Any) -> torch.Tensor:
    return torch.cat(list(batches))


@pytest.mark.parametrize(("scale", "weighting", "factor"), WEIGHTINGS)
@pytest.mark.parametrize("kind", ["plain", "padded", "overlap"])
def test_outputs_against_loops(scale: str, weighting: str, factor: float, kind: str) -> None:
    ffn, inputs = make_ffn(), make_inputs(60, batch_tokens=17)
    moe = make_moe(ffn, make_partition(kind), scale=scale, weighting=weighting, factor=factor)
    weights = torch.cat([moe.expert_weights(x) for x in inputs.inputs()])
    np.testing.assert_allclose(weights.numpy(), plain_expert_weights(moe, inputs.x_TH), rtol=1e-4, atol=1e-6)
    hidden = plain_weighted_hidden(moe, inputs.x_TH)
    np.testing.assert_allclose(all_of(moe.weighted_hidden(inputs)).numpy(), hidden, rtol=1e-4, atol=1e-4)
    outputs = all_of(moe.outputs(inputs))
    assert outputs.dtype == torch.float32
    np.testing.assert_allclose(outputs.numpy(), hidden @ moe.weights.down_HP.double().numpy().T, rtol=1e-4, atol=1e-3)


def test_outputs_expert_by_expert_and_token_by_token() -> None:
    """Without the places: shared neurons, then each selected expert's own neurons of the parent."""
    ffn, inputs = make_ffn(), make_inputs(20)
    moe = make_moe(ffn, factor=6.0)
    h, down = plain_hidden(ffn.gate_FH, ffn.up_FH, inputs.x_TH), ffn.down_HF.double().numpy()
    for t, y in enumerate(all_of(moe.outputs(inputs)).double().numpy()):
        expected = sum(h[t, j] * down[:, j] for j in moe.partition.shared)
        logits = moe.router_NH @ inputs.x_TH[t]
        for i in logits.topk(TOP_K).indices.tolist():
            for j in moe.partition.experts[i][moe.partition.experts[i] >= 0]:
                expected = expected + 6.0 / EXPERTS * h[t, j] * down[:, j]
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize(("weighting", "factor"), [("renormalised", 4.0), ("softmax", 4.0), ("sigmoid", 2.0)])
def test_all_experts_at_weight_one_are_the_dense_ffn(kind: str, weighting: str, factor: float) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind), top_k=EXPERTS, weighting=weighting, factor=factor)
    assert moe.coefficient == 1.0
    dense = all_of(dense_outputs(inputs, ffn))
    np.testing.assert_allclose(dense.numpy(), plain_dense(ffn, inputs.x_TH), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(all_of(moe.outputs(inputs)), dense, rtol=1e-5, atol=1e-4)


def test_hard_is_the_limit_of_a_soft_router_with_small_rows() -> None:
    inputs, soft = make_inputs(), make_moe(make_ffn(), scale="soft")
    hard = replace(soft, scale="hard")
    small = replace(soft, router_NH=soft.router_NH * 2.0**-20)
    torch.testing.assert_close(all_of(small.outputs(inputs)), all_of(hard.outputs(inputs)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", ["hard", "soft"])
def test_given_logits_take_the_place_of_the_router(scale: str) -> None:
    moe, x = make_moe(make_ffn(), scale=scale), make_inputs(30).x_TH
    other = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9))
    given = moe.expert_weights(x, x @ other.T)
    torch.testing.assert_close(given, replace(moe, router_NH=other).expert_weights(x))
    assert not torch.equal(given, moe.expert_weights(x))


@pytest.mark.parametrize("scale", ["hard", "soft"])
def test_batches_do_not_matter(scale: str) -> None:
    moe = make_moe(make_ffn(), scale=scale)
    one, many = (all_of(moe.outputs(make_inputs(50, size))) for size in (50, 7))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_compute_dtype_is_that_of_the_products() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    rough = replace(inputs, compute_dtype=torch.bfloat16)
    exact, found = all_of(moe.outputs(inputs)), all_of(moe.outputs(rough))
    assert found.dtype == torch.float32
    error = float((exact - found).norm() / exact.norm())
    assert 1e-4 < error < 0.1


# ---- transformers -------------------------------------------------------------------------------------------------


def fill(block: torch.nn.Module, moe: ConvertedFfn, bake: float) -> None:
    """Write the layer's weights into a transformers block, as the target spells them."""
    shared, weights = len(moe.partition.shared), moe.weights
    gate = weights.gate_PH[shared:].reshape(EXPERTS, -1, HIDDEN)
    up = weights.up_PH[shared:].reshape(EXPERTS, -1, HIDDEN)
    down = weights.down_HP[:, shared:].T.reshape(EXPERTS, -1, HIDDEN).transpose(1, 2)
    with torch.no_grad():
        block.gate.weight.copy_(moe.router_NH)
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], 1))
        block.experts.down_proj.copy_(down * bake)


def fill_shared(mlp: torch.nn.Module, weights: ExpertWeights, shared: int, bake: float) -> None:
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(weights.gate_PH[:shared])
        mlp.up_proj.weight.copy_(weights.up_PH[:shared])
        mlp.down_proj.weight.copy_(weights.down_HP[:, :shared] * bake)


def run(block: torch.nn.Module, inputs: LayerInputs) -> torch.Tensor:
    with torch.no_grad():
        return block(inputs.x_TH[None])[0]


SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_mixtral(factor: float) -> None:
    inputs = make_inputs()
    moe = make_moe(make_ffn(), make_partition("plain"), scale="soft", weighting="renormalised", factor=factor)
    block = MixtralSparseMoeBlock(MixtralConfig(**SIZES, intermediate_size=6, num_local_experts=EXPERTS))
    fill(block, moe, factor)
    torch.testing.assert_close(all_of(moe.outputs(inputs)), run(block, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_qwen2_moe(norm: bool) -> None:
    """Shared neurons are halved by sigmoid(0), so their down projection is stored doubled."""
    inputs = make_inputs()
    weighting = "renormalised" if norm else "softmax"
    moe = make_moe(make_ffn(), scale="soft", weighting=weighting, factor=3.0)
    config = Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        norm_topk_prob=norm,
    )
    block = Qwen2MoeSparseMoeBlock(config)
    fill(block, moe, 3.0)
    fill_shared(block.shared_expert, moe.weights, SHARED, 2.0)
    torch.nn.init.zeros_(block.shared_expert_gate.weight)
    torch.testing.assert_close(all_of(moe.outputs(inputs)), run(block, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_glm4_moe(norm: bool) -> None:
    inputs = make_inputs()
    weighting = TARGETS.get("glm4_moe").router_weighting("renormalised" if norm else "sigmoid")
    moe = make_moe(make_ffn(), scale="soft", weighting=weighting, factor=1.5)
    config = Glm4MoeConfig(
        **SIZES,
        moe_intermediate_size=SHARED,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        norm_topk_prob=norm,
        routed_scaling_factor=1.5,
        n_group=1,
        topk_group=1,
    )
    block = Glm4MoeMoE(config)
    block.experts.gate_up_proj = torch.nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH, HIDDEN))
    block.experts.down_proj = torch.nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
    fill(block, moe, 1.0)
    fill_shared(block.shared_experts, moe.weights, SHARED, 1.0)
    torch.testing.assert_close(all_of(moe.outputs(inputs)), run(block, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden_act", ["gelu_pytorch_tanh", "relu"])
def test_other_activations(hidden_act: str) -> None:
    inputs = make_inputs()
    moe = make_moe(make_ffn(), make_partition("plain"), scale="soft", weighting="renormalised", hidden_act=hidden_act)
    config = MixtralConfig(**SIZES, intermediate_size=6, num_local_experts=EXPERTS, hidden_act=hidden_act)
    block = MixtralSparseMoeBlock(config)
    fill(block, moe, float(EXPERTS))
    torch.testing.assert_close(all_of(moe.outputs(inputs)), run(block, inputs), rtol=1e-4, atol=1e-4)
