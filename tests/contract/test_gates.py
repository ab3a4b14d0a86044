"""Every gate on a converted model: another routing while it trains, none when it does not, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from llamamoe.training.gates import GATES
from llamamoe.training.moe_layers import MoeLayer, find_moe_layers
from llamamoe.training.routing import RouterTap, Routing

from . import live
from .world import World, digest, disturb, made, variants

NAMES = GATES.names()
REPLACING = [name for name in NAMES if GATES.get(name).replaces]
CASES = [(name, each) for name in NAMES for each in variants(GATES.get(name))]
Models = Callable[[str], Any]


@pytest.fixture(scope="module")
def models(world: World, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The model for a gate, with as many experts per token as it works with, without a gate."""
    folder = live.convert(world, tmp_path_factory.mktemp("gates") / "moe")
    loaded = {k: live.load(folder, num_experts_per_tok=k) for k in {GATES.get(n).top_k or 2 for n in NAMES}}
    return lambda name: loaded[GATES.get(name).top_k or 2]


def tight(name: str, options: dict[str, Any] | None = None) -> Any:
    """The gate; experts have room for half of a balanced load, where their room is limited."""
    room = {"capacity_factor": 0.5} if "capacity_factor" in GATES.get(name).Options.model_fields else {}
    return made(GATES.get(name), room | (options or {}))


def run(model: Any, world: World) -> list[Routing]:
    tap = RouterTap(find_moe_layers(model))
    with torch.no_grad(), tap.armed() as routings:
        model(input_ids=live.text(world), use_cache=False)
    tap.close()
    return routings


def seen(routings: list[Routing]) -> str:
    """Return a digest of the choices and weights that the experts were given."""
    return digest(*(each for r in routings for each in (r.indices_Tk, r.weights_Tk)))


def gated(model: Any, world: World, gate: Any, place: tuple[int, int, int] = (3, 1, 0), seed: int = 7) -> list[Routing]:
    gate.attach(find_moe_layers(model), seed)
    gate.set_step(*place)
    try:
        return run(model, world)
    finally:
        gate.detach()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_form_and_determinism(world: World, models: Models, name: str, options: dict[str, Any]) -> None:
    model = models(name)
    first = gated(model, world, tight(name, options))
    disturb()
    gated(model, world, tight(name, options), (5, 0, 1), seed=1)
    assert seen(first) == seen(gated(model, world, tight(name, options)))
    for routing in first:
        tokens = live.text(world).numel()
        k = GATES.get(name).top_k or 2
        assert routing.logits_TN.shape == (tokens, live.EXPERTS)
        assert routing.weights_Tk.shape == routing.indices_Tk.shape == (tokens, k)
        assert (routing.weights_Tk.dtype, routing.indices_Tk.dtype) == (torch.float32, torch.int64)
        assert 0 <= int(routing.indices_Tk.min()) <= int(routing.indices_Tk.max()) < live.EXPERTS
        assert routing.weights_Tk.isfinite().all()
        assert (routing.weights_Tk >= 0).all()
        if routing.dropped_Tk is not None:
            assert not routing.weights_Tk[routing.dropped_Tk].any(), "what is dropped weighs nothing"


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_without_a_trace(world: World, models: Models, name: str) -> None:
    """Native in eval mode while attached, and in both modes after; parameters keep their names and values."""
    model, gate = models(name), tight(name)
    state = {key: digest(value) for key, value in model.state_dict().items()}
    native = seen(run(model, world))
    gate.attach(find_moe_layers(model), 7)
    during = seen(run(model.eval(), world))
    gate.detach()
    after = seen(run(model.train(), world))
    assert native == during == after
    assert {key: digest(value) for key, value in model.state_dict().items()} == state
    assert not any("forward" in moe.router.__dict__ for moe in find_moe_layers(model))


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_the_routing_of_every_layer_in_training_mode(world: World, models: Models, name: str) -> None:
    """Choices or weights, on text of the model's own kind; the native gate alone changes nothing."""
    model = models(name)
    for native, under in zip(run(model, world), gated(model, world, tight(name)), strict=True):
        same = seen([native]) == seen([under])
        assert same != GATES.get(name).replaces


@pytest.mark.parametrize("name", REPLACING)
def test_it_routes_as_no_other_does(world: World, models: Models, name: str) -> None:
    same_k = [n for n in REPLACING if models(n) is models(name)]
    routings = {other: seen(gated(models(other), world, tight(other))) for other in same_k}
    assert [other for other in same_k if routings[other] == routings[name]] == [name]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in CASES if o])
def test_every_choice_of_words_has_an_effect(world: World, models: Models, name: str, options: dict[str, Any]) -> None:
    model = models(name)
    assert seen(gated(model, world, tight(name, options))) != seen(gated(model, world, tight(name)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_routers_and_what_the_gate_learns(world: World, models: Models, name: str) -> None:
    """From the model's own loss; what the gate learns survives a file of safetensors."""
    model, gate = models(name), tight(name)
    layers: list[MoeLayer] = find_moe_layers(model)
    gate.attach(layers, 7)
    try:
        model.zero_grad()
        ids = live.text(world)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in (*(moe.router_NH for moe in layers), *gate.parameters()):
            assert parameter.grad is not None
            assert float(parameter.grad.norm()) > 0
        state = gate.state_dict()
        assert len(state) == len(list(gate.parameters()))
        kept = load_tensors(save_tensors(state)) if state else {}
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter)
        gate.load_state_dict(kept)
        assert {key: digest(value) for key, value in gate.state_dict().items()} == {
            key: digest(value) for key, value in kept.items()
        }
    finally:
        gate.detach()
        model.zero_grad()
