"""Every routing loss on a converted model's routers: its form, its gradient, and that it pulls its own way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llamamoe.training.gates import GATES
from llamamoe.training.losses import LOSSES, LossContext
from llamamoe.training.moe_layers import MoeLayer, find_moe_layers
from llamamoe.training.routing import RouterTap, Routing

from . import live
from .world import LAYER, World, digest, disturb, made, variants

NAMES = LOSSES.names()
CASES = [(name, each) for name in NAMES for each in variants(LOSSES.get(name))]


@pytest.fixture(scope="module")
def routing(world: World, tmp_path_factory: pytest.TempPathFactory) -> Routing:
    """Return the routing of 48 tokens of text under a gate that adds noise, in float64."""
    model = live.load(live.convert(world, tmp_path_factory.mktemp("losses") / "moe"))
    moe = find_moe_layers(model)[LAYER]
    gate, tap = made(GATES.get("noisy_top_k")), RouterTap(find_moe_layers(model))
    gate.attach(find_moe_layers(model), 0)
    with torch.no_grad(), tap.armed(inputs=True) as routings:
        model(input_ids=live.text(world)[:1], use_cache=False)
    gate.detach()
    moe.block.double()
    found = routings[LAYER]
    assert found.inputs_TH is not None
    return as_wished(replace(found, moe=moe, inputs_TH=found.inputs_TH.double()), moe.router_NH.detach().double())


def as_wished(routing: Routing, rows_NH: torch.Tensor, tokens: slice = slice(None)) -> Routing:
    """The same choices and noise with logits from these rows, and weights from these logits; some tokens only."""
    assert routing.inputs_TH is not None
    assert routing.selection_TN is not None
    assert routing.noise_std_TN is not None
    x_TH, indices = routing.inputs_TH[tokens], routing.indices_Tk[tokens]
    logits = x_TH @ rows_NH.T
    noise = (routing.selection_TN - routing.logits_TN).detach().double()[tokens]
    selection = logits + noise
    weights = selection.softmax(-1).gather(-1, indices)
    std = routing.noise_std_TN.double()[tokens]
    return Routing(routing.moe, logits, weights, indices, selection, std, inputs_TH=x_TH)


def targets(world: World) -> LossContext:
    """The dense layer's output as what the experts together should give."""
    gate, up, down = (m.double() for m in (world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF))

    def dense(routing: Routing) -> torch.Tensor:
        assert routing.inputs_TH is not None
        x_TH = routing.inputs_TH.double()
        return (torch.nn.functional.silu(x_TH @ gate.T) * (x_TH @ up.T)) @ down.T

    return LossContext(targets=dense)


def value(world: World, name: str, routing: Routing, options: dict[str, Any] | None = None) -> torch.Tensor:
    found: torch.Tensor = made(LOSSES.get(name), options).loss([routing], targets(world))
    return found


def gradient(world: World, name: str, routing: Routing, options: dict[str, Any] | None = None) -> torch.Tensor:
    """With respect to the router's rows."""
    rows_NH = rows(routing.moe)
    (found,) = torch.autograd.grad(value(world, name, as_wished(routing, rows_NH), options), rows_NH)
    return found


def learned_gradients(
    world: World, name: str, routing: Routing, options: dict[str, Any] | None = None
) -> list[torch.Tensor | None]:
    """With respect to the router's rows and the experts' weights."""
    rows_NH, experts = rows(routing.moe), routing.moe.experts
    learned = [rows_NH, *(each.requires_grad_() for each in experts.parameters())]
    loss = value(world, name, as_wished(routing, rows_NH), options)
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    experts.requires_grad_(False)
    return list(found)


def rows(moe: MoeLayer) -> torch.Tensor:
    return moe.router_NH.detach().double().requires_grad_()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_form_and_determinism(world: World, routing: Routing, name: str, options: dict[str, Any]) -> None:
    first = value(world, name, routing, options)
    disturb()
    value(world, name, as_wished(routing, rows(routing.moe), slice(9)), options)
    assert digest(first) == digest(value(world, name, routing, options))
    assert (first.dtype, tuple(first.shape)) == (torch.float64, ())
    assert first.isfinite()
    twice = made(LOSSES.get(name), options).loss([routing, routing], targets(world))
    assert float(twice) == pytest.approx(float(first), rel=1e-12), "a mean over layers"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_never_computed_in_16_bits(world: World, routing: Routing, name: str) -> None:
    half = replace(
        routing, logits_TN=routing.logits_TN.detach().bfloat16(), weights_Tk=routing.weights_Tk.detach().bfloat16()
    )
    assert value(world, name, half).dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_gradient_is_that_of_finite_differences(
    world: World, routing: Routing, name: str, options: dict[str, Any]
) -> None:
    few = as_wished(routing, rows(routing.moe), slice(12))

    def loss(rows_NH: torch.Tensor) -> torch.Tensor:
        return value(world, name, as_wished(few, rows_NH), options)

    assert torch.autograd.gradcheck(loss, (rows(routing.moe),), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_linear_losses_are_sums_over_tokens_and_the_others_are_not(world: World, routing: Routing, name: str) -> None:
    now = routing.moe.router_NH.detach().double()
    whole = float(value(world, name, as_wished(routing, now)))
    parts = [float(value(world, name, as_wished(routing, now, each))) for each in (slice(17), slice(17, 48))]
    loss = made(LOSSES.get(name))
    assert (sum(parts) == pytest.approx(whole, rel=1e-9)) == loss.linear
    assert (loss.window is None) == loss.linear, "whose tokens are pooled matters to the others only"


@pytest.mark.parametrize("name", NAMES)
def test_it_looks_at_what_it_asks_for_and_at_nothing_else(world: World, routing: Routing, name: str) -> None:
    cls = LOSSES.get(name)
    if not cls.needs_targets:
        assert digest(made(cls).loss([routing], LossContext())) == digest(value(world, name, routing))
    if not cls.needs_inputs:
        without = replace(routing, inputs_TH=None)
        assert digest(value(world, name, without)) == digest(value(world, name, routing))
    if cls.needs_targets:
        other = LossContext(targets=lambda r: torch.ones_like(r.inputs_TH))
        assert digest(made(cls).loss([routing], other)) != digest(value(world, name, routing))


# ---- an effect ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_pulls_the_router_as_no_other_does(world: World, routing: Routing, name: str) -> None:
    """Its gradient is not zero, and points another way than that of every other loss."""
    found = gradient(world, name, routing)
    assert float(found.norm()) > 1e-6
    for other in NAMES:
        if other != name:
            theirs = gradient(world, other, routing)
            cosine = torch.nn.functional.cosine_similarity(found.flatten(), theirs.flatten(), dim=0)
            assert abs(float(cosine)) < 0.99, other


@pytest.mark.parametrize("name", NAMES)
def test_a_step_against_the_gradient_lowers_it(world: World, routing: Routing, name: str) -> None:
    slope, start = gradient(world, name, routing), routing.moe.router_NH.detach().double()
    step = 1e-3 * start.norm() * slope / slope.norm()
    before, after = (float(value(world, name, as_wished(routing, each))) for each in (start, start - step))
    assert after < before


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in CASES if o and "window" not in o])
def test_every_choice_of_words_has_an_effect(
    world: World, routing: Routing, name: str, options: dict[str, Any]
) -> None:
    found, plain = (learned_gradients(world, name, routing, each) for each in (options, None))
    pairs = [(a, b) for a, b in zip(found, plain, strict=True) if a is not None]
    assert any(b is None or digest(a) != digest(b) for a, b in pairs)


@pytest.mark.parametrize("name", [n for n in NAMES if not LOSSES.get(n).linear])
def test_the_window_says_whose_tokens_are_summed(routing: Routing, name: str) -> None:
    """The sum over ranks is asked for in the one window and not in the other."""
    asked: list[str] = []

    def all_reduce(values: torch.Tensor) -> torch.Tensor:
        asked.append(window)
        return values

    for window in ("micro_batch", "all_ranks"):
        made(LOSSES.get(name), {"window": window}).loss([routing], LossContext(all_reduce))
    assert asked == ["all_ranks"]
