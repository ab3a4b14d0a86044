"""Sums in float32, autocast and float64, repeated experts, and both layouts of `masked`."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from llamamoe.models.experts import EXPERTS, masked, products, register_experts
from llamamoe.models.experts.grouped import group_by_expert, scatter_linear

from .test_implementations import call, experts_of, make_model, plain, random_inputs

NAMES = register_experts()


def test_a_tokens_outputs_are_summed_in_float32() -> None:
    """300 experts that each add 1: a sum in bfloat16 would stop at 256."""
    indices = torch.arange(300)[None]
    groups = group_by_expert(indices, 300, pad=False)
    ones = torch.ones(300, 1, dtype=torch.bfloat16)
    out = scatter_linear(ones, torch.ones(300, 4, 1, dtype=torch.bfloat16), groups)
    assert out.dtype == torch.float32
    assert (out == 300).all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_float64_alone(name: str) -> None:
    inputs, indices = random_inputs(12, 4, 2)
    torch.testing.assert_close(call(name, inputs, indices, autocast=True), call(name, inputs, indices), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_every_product_in_bfloat16(name: str) -> None:
    """Float32 products would be more exact, and slow: no value or gradient may equal those without autocast."""
    inputs, indices = random_inputs(64, 4, 2, dtype=torch.float32)
    exact, cast = call(name, inputs, indices), call(name, inputs, indices, autocast=True)
    for full, low in zip(exact, cast, strict=True):
        assert low.dtype == torch.float32
        assert 1e-3 < (low - full).norm() / full.norm() < 2e-2
    for weight in cast[2:4]:
        assert torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("gradients", [False, True])
def test_an_expert_selected_twice_counts_twice(name: str, tokens: int, gradients: bool) -> None:
    inputs, indices = random_inputs(tokens, 5, 3)
    indices[:, 2] = indices[:, 0]
    x, gate_up, down, weights = inputs
    experts = experts_of(make_model(num_local_experts=5))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    with torch.set_grad_enabled(gradients):
        y = EXPERTS.get(name.removeprefix("llamamoe_"))()(experts, x, indices, weights)
    torch.testing.assert_close(y.detach(), plain(x, gate_up, down, indices, weights))


@pytest.mark.parametrize("regroup", [False, True])
def test_both_layouts_of_masked_agree_with_eager(regroup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "FEW", 0)
    monkeypatch.setattr(masked, "SOME", 0)
    monkeypatch.setattr(masked, "_regroup", lambda *sizes: regroup)
    inputs, indices = random_inputs(20, 4, 2, width=8)
    for mine, expected in zip(call("masked", inputs, indices), call("eager", inputs, indices), strict=True):
        torch.testing.assert_close(mine, expected)


def test_masked_copies_weights_only_for_many_tokens() -> None:
    assert not masked._regroup(16, 576, 16)
    assert masked._regroup(2048, 576, 192)


def test_one_bfloat16_token_leaves_torchs_switch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products take torch's own kernel; what others then compute takes oneDNN again, after an error, too."""
    experts, run = experts_of(make_model(num_local_experts=6)), EXPERTS.get("sorted")()
    (x, gate_up, down, weights), indices = random_inputs(1, 6, 2, dtype=torch.bfloat16)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    before, seen, mm = torch.backends.mkldnn.enabled, [], torch.mm

    def spy(*args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.mkldnn.enabled)
        if len(seen) == 3:
            raise RuntimeError("stop")
        return mm(*args, out=out)

    with torch.no_grad():
        wanted = plain(*(t.double() for t in (x, gate_up, down)), indices, weights.double())
        got = run(experts, x, indices, weights).double()
        assert torch.allclose(got, wanted, atol=0.02 * float(wanted.abs().max()))
        assert torch.backends.mkldnn.enabled == before
        monkeypatch.setattr("torch.mm", spy)
        with pytest.raises(RuntimeError, match="stop"):
            run(experts, x, indices, weights)
    assert seen == [False] * 3
    assert torch.backends.mkldnn.enabled == before


def test_the_switch_is_left_alone_beside_other_threads_for_large_matrices_and_frozen_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, run = experts_of(make_model(num_local_experts=6)), EXPERTS.get("sorted")()
    (x, gate_up, down, weights), indices = random_inputs(1, 6, 2, dtype=torch.bfloat16)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    before, seen, mm = torch.backends.mkldnn.enabled, set(), torch.mm

    def spy(*args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.add(torch.backends.mkldnn.enabled)
        return mm(*args, out=out)

    monkeypatch.setattr("torch.mm", spy)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with torch.no_grad():
            run(experts, x, indices, weights)
    finally:
        done.set()
        other.join()
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(products, "SMALL", 0)
        run(experts, x, indices, weights)
    monkeypatch.setattr("torch.backends.flags_frozen", lambda: True)
    with torch.no_grad():
        run(experts, x, indices, weights)
    assert seen == {before}


@pytest.mark.parametrize("missing", [False, True], ids=["all here", "some on another rank"])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_grouped_products_in_float32_are_those_written_out(tokens: int, missing: bool) -> None:
    """The other tests compute in float64, which torch's grouped product does not know."""
    inputs, indices = random_inputs(tokens, 4, 2, width=8, dtype=torch.float32)
    if missing:
        indices[::2, 0] = 4
        indices[1::2, 1] = -1
    mine = call("grouped_mm", inputs, indices)
    doubled = [each.double() for each in inputs]
    for found, expected in zip(mine, call("masked", doubled, indices), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
