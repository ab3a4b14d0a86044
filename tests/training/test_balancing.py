"""The bias update written out, over micro-batches and ranks; it balances, and only where there is a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llamamoe.errors import RefusedError
from llamamoe.training.balancing import BalancingOptions, BiasBalancing
from llamamoe.training.moe_layers import find_moe_layers
from llamamoe.training.routing import RouterTap

from .tiny_moe import H, N, input_ids, routed, tiny_moe

BIASED = ["glm4_moe", "ernie4_5_moe"]


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("form", ["sign", "proportional"])
def test_the_update_is_the_rule_over_all_micro_batches(name: str, form: Any) -> None:
    model = tiny_moe(name)
    layers = find_moe_layers(model)
    balancing = BiasBalancing(layers, BalancingOptions(rate=0.01, form=form))
    tap = RouterTap(layers)
    loads = torch.zeros(2, N)
    for seed in range(3):
        with tap.armed() as routings:
            model(input_ids=input_ids(seed=seed))
        balancing.observe(routings)
        for load, routing in zip(loads, routings, strict=True):
            for expert in routing.indices_Tk.reshape(-1).tolist():
                load[expert] += 1
    shapes = [moe.correction_bias.shape for moe in layers]
    balancing.update()
    for moe, load, shape in zip(layers, loads, shapes, strict=True):
        excess = load.mean() - load
        step = excess.sign() if form == "sign" else excess / load.mean()
        assert moe.correction_bias.shape == shape
        torch.testing.assert_close(moe.correction_bias.reshape(-1), 0.01 * step)
        assert not moe.correction_bias.requires_grad


def test_counts_are_summed_over_ranks() -> None:
    layers = find_moe_layers(tiny_moe("glm4_moe"))
    other = torch.tensor([100.0, 0, 0, 0, 0, 0] * 2)
    balancing = BiasBalancing(layers, BalancingOptions(rate=0.01), lambda counts: counts + other)
    balancing.observe([routed(moe, torch.randn(10, H)) for moe in layers])
    balancing.update()
    expected = torch.tensor([-0.01] + [0.01] * 5)
    assert all(torch.equal(moe.correction_bias, expected) for moe in layers)


def test_one_update_per_step() -> None:
    layers = find_moe_layers(tiny_moe("glm4_moe"))
    balancing = BiasBalancing(layers)
    balancing.observe([routed(moe, torch.randn(10, H)) for moe in layers])
    balancing.update()
    with pytest.raises(ValueError, match=r"layers \[0, 1\] were not observed"):
        balancing.update()


@pytest.mark.parametrize("name", BIASED)
def test_it_balances_a_skewed_router_without_a_loss(name: str) -> None:
    moe = find_moe_layers(tiny_moe(name))[0]
    x_TH = torch.randn(400, H, generator=torch.Generator().manual_seed(0)) + 0.5
    balancing = BiasBalancing([moe], BalancingOptions(rate=0.005))
    before = routed(moe, x_TH).counts_N().max()
    for _ in range(150):
        balancing.observe([routed(moe, x_TH)])
        balancing.update()
    mean = 400 * 2 / N
    assert float(before) > 1.3 * mean
    assert float(routed(moe, x_TH).counts_N().max()) < 1.1 * mean


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared"])
def test_routers_without_a_bias_are_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(RefusedError, match=r"no correction bias[\s\S]*switch or cv_squared"):
        BiasBalancing(find_moe_layers(tiny_moe(name)))


def test_a_bias_of_few_digits_is_refused() -> None:
    with pytest.raises(RefusedError, match="bfloat16"):
        BiasBalancing(find_moe_layers(tiny_moe("glm4_moe").to(torch.bfloat16)))
