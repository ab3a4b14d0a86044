"""The objective of a layer: the weighted error and the balance, written out, and competition for the router alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.healing.block import load_ffn
from llamamoe.healing.plan import plan_heal
from llamamoe.healing.train_layer import LayerTask, _Competitive, _descend, _Joint, start_router
from llamamoe.methods.layer import LayerInputs
from tests.dense import make_dense
from tests.healing.common import convert, heal_recipe


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), coefficient=st.sampled_from([0.0, 0.3]))
def test_the_loss_is_the_weighted_error_and_the_balance(
    model: Path, dense: Path, text: Path, seed: int, coefficient: float
) -> None:
    recipe = heal_recipe(text, losses={"switch": coefficient})
    plan = plan_heal(model, dense, recipe)
    ffn = load_ffn(plan, 0, plan.checkpoint.read)
    ffn.moe.router_NH.mul_(1e5)  # a hard router's float32 probabilities tie where its logits do not
    g = torch.Generator().manual_seed(seed)
    x, aims = torch.randn(2, 40, 64, generator=g)
    size = torch.rand(40, generator=g) + 0.5
    task = LayerTask(LayerInputs(x, size, torch.device("cpu"), torch.float32), aims, 30, recipe, 0)
    rows = torch.tensor([3, 7, 11, 29])
    loss = float(_Joint(ffn, task)(rows))

    weight = (1 / size) ** 2 / ((1 / size) ** 2).mean()
    logits = x[rows] @ ffn.moe.router_NH.T
    missed = torch.zeros(())
    for t, row in enumerate(rows):
        chosen = logits[t].topk(2)
        out = torch.zeros(64)
        for share, e in zip(chosen.values.softmax(0), chosen.indices, strict=True):
            gate, up = (ffn.moe.experts.gate_up_proj[e] @ x[row]).chunk(2)
            out += share * (ffn.moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        missed += weight[row] * (aims[row] - out).square().sum()
    power = (weight[:30, None] * aims[:30].square()).sum() / 30
    counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=4) / 8
    balance = 4 * (counts * logits.softmax(1).mean(0)).sum()
    assert loss == pytest.approx(float(missed / 4 / power + coefficient * balance), rel=1e-3)


def test_the_competitive_warm_up_moves_routers_only_and_lowers_its_loss(model: Path, dense: Path, text: Path) -> None:
    recipe = heal_recipe(text, competitive_epochs=3, router_lr=0.1)
    plan = plan_heal(model, dense, recipe)
    ffn = load_ffn(plan, 0, plan.checkpoint.read)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 64, generator=g)
    aims = torch.randn(1024, 64, generator=g)
    task = LayerTask(LayerInputs(x, torch.ones(1024), torch.device("cpu"), torch.float32), aims, 768, recipe, 0)
    # each token's aim is what one expert, chosen by a linear function of x, puts out alone
    planted = (x @ torch.randn(64, 4, generator=g)).argmax(1)
    for e in range(4):
        gate, up = (x @ ffn.moe.experts.gate_up_proj[e].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ ffn.moe.experts.down_proj[e].T
        aims[planted == e] = out[planted == e]
    start_router(ffn, task)
    before = {name: value.clone() for name, value in ffn.parameters().items()}
    loss = _Competitive(ffn, task)
    held_out = torch.arange(768, 1024)
    found = float(loss(held_out)), float((ffn.logits(x[768:]).argmax(1) == planted[768:]).float().mean())
    _descend(loss, {"gate.weight": ffn.moe.router_NH}, task, 12, ffn.moe.router_NH)
    after = float(loss(held_out)), float((ffn.logits(x[768:]).argmax(1) == planted[768:]).float().mean())
    assert after[0] < found[0]
    assert after[1] > found[1] + 0.2
    assert [name for name, value in ffn.parameters().items() if not value.equal(before[name])] == ["mlp.gate.weight"]


@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared", "qwen2_moe"])
def test_routers_learn_at_their_own_rate_whatever_they_are_called(target: str, text: Path, tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense")
    recipe = heal_recipe(text, router_lr=1e-9)
    plan = plan_heal(convert(source, tmp_path / "moe", target=target), source, recipe)
    ffn = load_ffn(plan, 0, plan.checkpoint.read)
    g = torch.Generator().manual_seed(0)
    x, aims = torch.randn(1024, 64, generator=g), torch.randn(1024, 64, generator=g)
    task = LayerTask(LayerInputs(x, torch.ones(1024), torch.device("cpu"), torch.float32), aims, 768, recipe, 0)
    start_router(ffn, task)
    before = {name: value.detach().clone() for name, value in ffn.trained(router=True).items()}
    _descend(_Joint(ffn, task), ffn.trained(router=True), task, 1, ffn.moe.router_NH)
    for name, value in ffn.trained(router=True).items():
        moved = float((value - before[name]).abs().mean() / before[name].abs().mean())
        assert (moved < 1e-6) is (value is ffn.moe.router_NH), (name, moved)
