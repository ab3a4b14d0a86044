"""Every router: the form of its rows, what decides them, and that they route."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from llamamoe.errors import RefusedError
from llamamoe.methods.contributions import router_quality
from llamamoe.methods.layer import ExpertWeights, FfnWeights, LayerContext, LayerInputs, Partition
from llamamoe.methods.moe_layer import ConvertedFfn
from llamamoe.methods.repairs import REPAIRS
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.routers.base import Router
from llamamoe.methods.selectors import SELECTORS
from llamamoe.methods.splitters import SPLITTERS

from .world import World, check_needs, digest, disturb, made, shown, variants

WRITTEN = [name for name in ROUTERS.names() if ROUTERS.get(name).exportable]
NEEDED: dict[str, dict[str, dict[str, Any]]] = {"distilled": {"weighting": {"importance": "gain"}}}
"""Options that mean something only together with others."""
CASES = [(name, each) for name in WRITTEN for each in variants(ROUTERS.get(name), NEEDED.get(name))]
EXPERTS, TOP_K, WIDTH = 8, 2, 18


@pytest.fixture(scope="module")
def partition(world: World) -> Partition:
    """Experts of neurons that point the same way beside the 43 strongest, with padding; no rows come with it."""
    context = world.context(EXPERTS, TOP_K, WIDTH)
    shared = made(SELECTORS.get("power")).select(world.ffn, 43, context)
    found: Partition = made(SPLITTERS.get("kmeans")).split(world.ffn, shared, context)
    return found


def rows(world: World, name: str, partition: Partition, options: dict[str, Any] | None = None, **keys: Any) -> Any:
    return made(ROUTERS.get(name), options).rows(world.ffn, partition, world.context(EXPERTS, TOP_K, WIDTH, **keys))


def as_layer(world: World, partition: Partition, rows_NH: torch.Tensor) -> ConvertedFfn:
    """The converted layer under a hard router with these rows, c = 1."""
    weights = ExpertWeights.of_parent(world.ffn, partition)
    return ConvertedFfn(weights, partition, rows_NH, TOP_K, "hard", "softmax", float(EXPERTS))


@pytest.mark.parametrize("tokens", ["all", "few"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_form_and_determinism(
    world: World, partition: Partition, name: str, options: dict[str, Any], tokens: str
) -> None:
    inputs = world.inputs if tokens == "all" else world.part(1)
    before = digest(inputs.x_TH, world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF, partition.experts)
    first = rows(world, name, partition, options, inputs=inputs)
    disturb()
    rows(world, name, partition, options, inputs=world.part(2), seed=5)
    assert digest(first) == digest(rows(world, name, partition, options, inputs=inputs))
    assert (first.dtype, tuple(first.shape), first.device.type) == (torch.float32, (EXPERTS, 64), "cpu")
    assert first.isfinite().all()
    assert not first.requires_grad
    assert before == digest(inputs.x_TH, world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF, partition.experts)


@pytest.mark.parametrize("name", sorted(set(ROUTERS.names()) - set(WRITTEN)))
def test_a_router_that_no_file_holds_refuses_to_give_rows(world: World, partition: Partition, name: str) -> None:
    with pytest.raises(RefusedError, match=r"[\s\S]*compare"):
        rows(world, name, partition)


@pytest.mark.parametrize("name", WRITTEN)
def test_it_looks_at_what_it_needs_and_at_nothing_else(world: World, partition: Partition, name: str) -> None:
    needs = ROUTERS.get(name).needs

    def result(ffn: FfnWeights, inputs: LayerInputs) -> str:
        context = shown(world.context(EXPERTS, TOP_K, WIDTH, inputs=inputs), needs)
        return digest(made(ROUTERS.get(name)).rows(ffn, partition, context))

    check_needs(needs, result, world.ffn, world.inputs, world.other)


# ---- an effect ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(world: World, partition: Partition) -> Any:
    """Rows by name and options, on all tokens."""

    @cache
    def get(name: str, given: tuple[tuple[str, Any], ...] = ()) -> torch.Tensor:
        found: torch.Tensor = rows(world, name, partition, dict(given))
        return found

    return get


@pytest.mark.parametrize("name", WRITTEN)
def test_its_rows_are_those_of_no_other(results: Any, name: str) -> None:
    """They differ from every other router's by more than rounding, whatever the size of the rows."""
    unit = {each: torch.nn.functional.normalize(results(each).flatten(), dim=0) for each in WRITTEN}
    assert [each for each in WRITTEN if float((unit[each] - unit[name]).norm()) < 1e-2] == [name]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in CASES if o])
def test_every_choice_of_words_has_an_effect(results: Any, name: str, options: dict[str, Any]) -> None:
    without = {key: value for key, value in options.items() if key in NEEDED.get(name, {}).get(list(options)[-1], {})}
    found, base = (results(name, tuple(each.items())) for each in (options, without))
    assert float((found - base).norm()) > 1e-3 * float(base.norm())


@pytest.mark.parametrize("name", WRITTEN)
def test_tokens_go_different_ways(world: World, partition: Partition, results: Any, name: str) -> None:
    """Every expert is chosen by some tokens; those chosen after looking at activations hold more than by chance."""
    quality = router_quality(as_layer(world, partition, results(name)), world.ffn, world.inputs)
    if name == "zeros":
        assert quality["dead_experts"] == EXPERTS - TOP_K, "the control: ties decide"
        return
    assert quality["dead_experts"] < EXPERTS - TOP_K
    if ROUTERS.get(name).needs == "activations":
        assert quality["captured"] > 1.02 * quality["captured_by_chance"]


@pytest.mark.parametrize("name", [n for n in WRITTEN if ROUTERS.get(n).refit is not Router.refit])
def test_a_refit_looks_at_the_repaired_experts(world: World, partition: Partition, name: str) -> None:
    router, context = made(ROUTERS.get(name)), world.context(EXPERTS, TOP_K, WIDTH)
    moe = as_layer(world, partition, router.rows(world.ffn, partition, context))
    repaired = replace(moe, weights=made(REPAIRS.get("least_squares")).repair(moe, world.ffn, context))
    fitted = router.refit(repaired, world.ffn, context)
    assert (fitted.dtype, fitted.shape) == (torch.float32, moe.router_NH.shape)
    assert float((fitted - moe.router_NH).norm()) > 1e-3 * float(moe.router_NH.norm())
    assert torch.equal(fitted, router.refit(repaired, world.ffn, context))


@pytest.mark.parametrize("name", [n for n in WRITTEN if ROUTERS.get(n).refit is Router.refit])
def test_others_keep_their_rows(world: World, partition: Partition, name: str) -> None:
    moe = as_layer(world, partition, rows(world, name, partition))
    context: LayerContext = world.context(EXPERTS, TOP_K, WIDTH)
    assert made(ROUTERS.get(name)).refit(moe, world.ffn, context) is moe.router_NH
