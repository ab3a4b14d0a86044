"""Every implementation against transformers' own ``eager`` and against the sum written out per token and expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from llamamoe.errors import RefusedError
from llamamoe.models.experts import EXPERTS, register_experts
from llamamoe.models.experts.grouped import _few_sizes, group_by_expert

NAMES = register_experts()
HIDDEN, WIDTH, EXPERTS_COUNT, TOP_K = 24, 8, 5, 2
TARGETS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS_COUNT, "intermediate_size": WIDTH},
    "qwen2_moe": {
        "num_experts": EXPERTS_COUNT,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 8,
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        "n_routed_experts": EXPERTS_COUNT,
        "moe_intermediate_size": WIDTH,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoeshared": {
        "num_local_experts": EXPERTS_COUNT,
        "intermediate_size": WIDTH,
        "shared_intermediate_size": 8,
    },
    "hunyuan_v1_moe": {"num_experts": EXPERTS_COUNT, "intermediate_size": WIDTH, "head_dim": HIDDEN // 2},
    "flex_olmo": {"num_experts": EXPERTS_COUNT, "intermediate_size": WIDTH},
    "qwen3_5_moe_text": {
        "num_experts": EXPERTS_COUNT,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 8,
        "head_dim": HIDDEN // 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
    },
    "cohere2_moe": {"num_experts": EXPERTS_COUNT, "intermediate_size": WIDTH, "head_dim": HIDDEN // 2},
    "granitemoe_swa": {
        "num_local_experts": EXPERTS_COUNT,
        "intermediate_size": WIDTH,
        "shared_intermediate_size": 8,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS_COUNT,
        "moe_k": TOP_K,
        "moe_intermediate_size": WIDTH,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
}


def make_model(target: str = "mixtral", *, top_k: int = TOP_K, dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    """A tiny random model of one layer whose weights are of order 1, so that routing and experts matter."""
    common = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 48,
        "num_experts_per_tok": top_k,
        "pad_token_id": 0,
    }
    given = common | TARGETS[target] | ({"moe_k": top_k} if target == "ernie4_5_moe" else {}) | keys
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(target, **given)).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.3)
    return model


def experts_of(model: Any) -> Any:
    return next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "_apply_gate"))


def loss_and_gradients(model: Any, implementation: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.double() * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).mean().backward()
    found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return {"logits": logits.detach(), **found}


def plain(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Token by token, place by place."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for place, i in enumerate(indices[t].tolist()):
            if 0 <= i < len(down):
                gate, up = (gate_up[i] @ x[t]).chunk(2)
                row = row + weights[t, place] * (down[i] @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def call(
    name: str, inputs: list[torch.Tensor], indices: torch.Tensor, *, recompute: bool = False, autocast: bool = False
) -> tuple[torch.Tensor, ...]:
    """Output and gradients with regard to x, gate_up, down and weights, for one loss."""
    x, gate_up, down, weights = (t.clone().requires_grad_() for t in inputs)
    experts = experts_of(make_model(num_local_experts=len(down)))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    run = EXPERTS.get(name.removeprefix("llamamoe_"))() if name != "eager" else type(experts).forward.__wrapped__
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if recompute:
            y = checkpoint(run, experts, x, indices, weights, use_reentrant=False)
        else:
            y = run(experts, x, indices, weights)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad, experts.gate_up_proj.grad, experts.down_proj.grad, weights.grad


def random_inputs(
    tokens: int, num_experts: int, top_k: int, width: int = WIDTH, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HIDDEN), (num_experts, 2 * width, HIDDEN), (num_experts, HIDDEN, width))
    x, gate_up, down = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    indices = torch.rand(tokens, num_experts, generator=g).topk(top_k)[1]
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64) + 0.1
    return [t.to(dtype) for t in (x, gate_up / HIDDEN**0.5, down / width**0.5, weights)], indices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("top_k", [TOP_K, EXPERTS_COUNT], ids=["k=2", "k=N"])
@pytest.mark.parametrize("target", TARGETS)
def test_logits_and_all_gradients_of_a_model_are_those_of_eager(target: str, top_k: int, dtype: torch.dtype) -> None:
    model = make_model(target, top_k=top_k, dtype=dtype)
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = loss_and_gradients(model, "eager", ids)
    assert any("gate_up_proj" in name for name in expected)
    tolerance = (
        1e-10 if dtype == torch.float64 and target not in ("flex_olmo", "cohere2_moe", "qwen3_5_moe_text") else 2e-4
    )  # its norms compute in float32
    for name in NAMES:
        found = loss_and_gradients(model, name, ids)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= tolerance * value.abs().max() + 1e-12, (name, key)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bfloat16_is_as_near_to_float64_as_eager_is(target: str, autocast: bool) -> None:
    exact_model = make_model(target)
    model = make_model(target, dtype=torch.float32 if autocast else torch.bfloat16)
    experts, exact = experts_of(model), experts_of(exact_model)
    (x, _, _, weights), indices = random_inputs(64, EXPERTS_COUNT, TOP_K)
    with torch.no_grad():
        exact.gate_up_proj.copy_(experts.gate_up_proj)
        exact.down_proj.copy_(experts.down_proj)
    low = torch.float32 if autocast else torch.bfloat16
    exact.config._experts_implementation = "eager"
    truth = exact(x.to(low).double(), indices, weights.to(low).double())
    errors: dict[str, float] = {}
    for name in ["eager", *NAMES]:
        experts.config._experts_implementation = name
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = experts(x.to(low), indices, weights.to(low))
        assert y.dtype == low
        errors[name] = float((y.double() - truth.detach()).norm() / truth.detach().norm())
    assert errors["eager"] > 1e-4  # it did compute in bfloat16
    for name in NAMES:
        assert errors[name] < 1.3 * errors["eager"], errors


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    tokens=st.integers(1, 40),
    num_experts=st.integers(1, 7),
    top_k=st.integers(1, 7),
    width=st.sampled_from([1, 3, 16]),
    crowded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_sum_over_experts_written_out(
    name: str, tokens: int, num_experts: int, top_k: int, width: int, crowded: bool, seed: int
) -> None:
    inputs, indices = random_inputs(tokens, num_experts, min(top_k, num_experts), width, seed=seed)
    if crowded:  # all tokens in one order of experts: the others get none
        indices = torch.arange(indices.shape[1]).expand_as(indices).contiguous()
    leaves = [t.clone().requires_grad_() for t in inputs]
    x, gate_up, down, weights = leaves
    y = plain(x, gate_up, down, indices, weights)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = call(name, inputs, indices)
    zero_if_none = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    for mine, expected in zip(found, [y.detach(), *zero_if_none], strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if mine is None else mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_at_all(name: str) -> None:
    """A rank of expert parallelism may get no token."""
    inputs, indices = random_inputs(0, 4, 2)
    y, grad_x, grad_gate_up, grad_down, grad_weights = call(name, inputs, indices)
    assert y.shape == grad_x.shape == (0, HIDDEN)
    assert grad_weights.shape == (0, 2)
    assert not grad_gate_up.any()
    assert not grad_down.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 12])
def test_what_lies_outside_the_experts_is_not_selected(name: str, tokens: int) -> None:
    """Another rank's experts come as N, padding tokens of transformers' expert parallelism as -1."""
    inputs, indices = random_inputs(tokens, 4, 3)
    indices[:, 1] = 4
    indices[-1, 2] = -1
    x, gate_up, down, weights = inputs
    expected = plain(x, gate_up, down, indices, weights)
    y, _, _, _, grad_weights = call(name, inputs, indices)
    torch.testing.assert_close(y, expected)
    assert (grad_weights[:, 1] == 0).all()
    assert grad_weights[-1, 2] == 0
    assert (grad_weights[:, 0] != 0).all()


class _Masks(TorchDispatchMode):
    """Counts passes that blank out rows."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "masked_fill" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("outside", [None, 4, -1])
def test_grouped_products_mask_rows_only_if_another_ranks_expert_is_selected(outside: int | None) -> None:
    (x, gate_up, down, weights), indices = random_inputs(6, 4, 2, dtype=torch.float32)
    if outside is not None:
        indices[2, 1] = outside
    experts = experts_of(make_model(num_local_experts=4, dtype=torch.float32))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    with torch.no_grad(), _Masks() as masks:
        y = EXPERTS.get("grouped_mm")()(experts, x, indices, weights)
    assert (masks.count > 0) == (outside is not None)
    torch.testing.assert_close(y, plain(x, gate_up, down, indices, weights))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("top_k", [3, 40])
def test_one_token_without_gradients_takes_a_path_that_agrees(name: str, dtype: torch.dtype, top_k: int) -> None:
    inputs, indices = random_inputs(1, 40, top_k, dtype=dtype)
    indices[0, 0] = 40
    x, gate_up, down, weights = inputs
    experts = experts_of(make_model(num_local_experts=40))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    with torch.no_grad():
        y = EXPERTS.get(name.removeprefix("llamamoe_"))()(experts, x, indices, weights)
        expected = plain(*(t.double() for t in (x, gate_up, down)), indices, weights.double())
    assert y.dtype == dtype
    limit = 1e-12 if dtype == torch.float64 else 1e-2
    assert (y - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_bit(name: str, autocast: bool) -> None:
    inputs, indices = random_inputs(70, 4, 2, dtype=torch.float32)
    once = call(name, inputs, indices, autocast=autocast)
    twice = call(name, inputs, indices, recompute=True, autocast=autocast)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


def test_groups_padded_for_bfloat16_give_the_gradients_of_unpadded_ones() -> None:
    """73 tokens on 3 experts: their groups are no round numbers, so bfloat16 pads and float32 does not."""
    inputs, indices = random_inputs(73, 3, 2, dtype=torch.bfloat16)
    assert group_by_expert(indices, 3, pad=True).padding_R is not None
    padded = call("sorted", inputs, indices)
    exact = call("sorted", [t.float() for t in inputs], indices)
    for a, b in zip(padded, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 1e-2 * b.norm()


@given(st.integers(1, 5000))
def test_padded_sizes_are_few_and_little_larger(count: int) -> None:
    size = _few_sizes(count)
    assert count <= size <= count * 9 / 8
    assert _few_sizes(size) == size
    assert len({_few_sizes(n) for n in range(1, 2048)}) <= 8 * 11


@pytest.mark.parametrize("name", NAMES)
def test_frozen_experts_get_no_gradient_and_the_router_does(name: str) -> None:
    model = make_model()
    experts = experts_of(model)
    experts.requires_grad_(False)
    ids = torch.arange(6)[None]
    expected = loss_and_gradients(model, "eager", ids)
    found = loss_and_gradients(model, name, ids)
    assert found.keys() == expected.keys()
    assert not any("experts" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_other_activations_than_silu(name: str) -> None:
    model = make_model(hidden_act="gelu_pytorch_tanh")
    ids = torch.arange(6)[None]
    expected = loss_and_gradients(model, "eager", ids)
    for key, value in loss_and_gradients(model, name, ids).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_another_layout_are_refused(name: str) -> None:
    experts = experts_of(make_model())
    experts.has_bias = True
    (x, _, _, weights), indices = random_inputs(2, EXPERTS_COUNT, 2)
    with pytest.raises(RefusedError, match="has_bias = True") as caught:
        EXPERTS.get(name.removeprefix("llamamoe_"))()(experts, x, indices, weights)
    assert "grouped_mm" in str(caught.value.hint)
