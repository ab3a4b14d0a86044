"""Every repair: what it may change, what decides it, and that the layer's error falls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llamamoe.methods.layer import PADDING, ExpertWeights, LayerInputs, Partition
from llamamoe.methods.moe_layer import ConvertedFfn, dense_outputs
from llamamoe.methods.repairs import REPAIRS
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.selectors import SELECTORS
from llamamoe.methods.splitters import SPLITTERS

from .world import World, digest, disturb, made, quick, variants

CASES = [(name, each) for name in REPAIRS.names() for each in variants(REPAIRS.get(name))]
FITTED = [name for name in REPAIRS.names() if REPAIRS.get(name).needs != "nothing"]
EXPERTS, TOP_K, WIDTH = 8, 2, 18
PARTS = ("gate_PH", "up_PH", "down_HP")


@pytest.fixture(scope="module")
def moe(world: World) -> ConvertedFfn:
    """Experts of neurons that point the same way beside the 43 strongest, with padding, under a router that fits."""
    context = world.context(EXPERTS, TOP_K, WIDTH)
    shared = made(SELECTORS.get("power")).select(world.ffn, 43, context)
    partition = made(SPLITTERS.get("kmeans")).split(world.ffn, shared, context)
    rows = made(ROUTERS.get("ridge")).rows(world.ffn, partition, context)
    weights = ExpertWeights.of_parent(world.ffn, partition)
    return ConvertedFfn(weights, partition, rows, TOP_K, "hard", "softmax", float(EXPERTS))


def repaired(
    world: World, moe: ConvertedFfn, name: str, options: dict[str, Any] | None = None, **keys: Any
) -> ExpertWeights:
    context = world.context(EXPERTS, TOP_K, WIDTH, **keys)
    found: ExpertWeights = made(REPAIRS.get(name), options).repair(moe, world.ffn, context)
    return found


def whole(weights: ExpertWeights) -> str:
    return digest(weights.gate_PH, weights.up_PH, weights.down_HP)


def error(world: World, moe: ConvertedFfn, weights: ExpertWeights, inputs: LayerInputs | None = None) -> float:
    """Squared distance of the layer's output from the dense one's, relative to that one."""
    inputs = inputs or world.inputs
    pairs = zip(dense_outputs(inputs, world.ffn), replace(moe, weights=weights).outputs(inputs), strict=True)
    sums = [((y - z).double().square().sum(), y.double().square().sum()) for y, z in pairs]
    return float(sum(s for s, _ in sums) / sum(s for _, s in sums))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_form_and_determinism(world: World, moe: ConvertedFfn, name: str, options: dict[str, Any]) -> None:
    options = quick(REPAIRS.get(name)) | options
    few = world.part(4)
    before = whole(moe.weights), digest(few.x_TH, world.ffn.gate_FH, world.ffn.down_HF, moe.router_NH)
    first = repaired(world, moe, name, options, inputs=few)
    disturb()
    repaired(world, moe, name, options, inputs=world.part(2), seed=5)
    assert whole(first) == whole(repaired(world, moe, name, options, inputs=few))
    assert before == (whole(moe.weights), digest(few.x_TH, world.ffn.gate_FH, world.ffn.down_HF, moe.router_NH))
    padding = torch.from_numpy(moe.partition.slots == PADDING)
    assert padding.any()
    for part in PARTS:
        have, parent = getattr(first, part), getattr(moe.weights, part)
        assert (have.dtype, have.shape, have.device.type) == (torch.float32, parent.shape, "cpu")
        assert have.isfinite().all()
        assert not have.requires_grad
    for rows in (first.gate_PH, first.up_PH, first.down_HP.T):
        assert not rows[padding].any()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_it_keeps_is_the_parents_bit_for_bit(
    world: World, moe: ConvertedFfn, name: str, options: dict[str, Any]
) -> None:
    found = repaired(world, moe, name, quick(REPAIRS.get(name)) | options, inputs=world.part(4))
    for part in PARTS[: {"neurons": 3, "gate_up": 2, "nothing": 0}[REPAIRS.get(name).keeps]]:
        assert torch.equal(getattr(found, part), getattr(moe.weights, part)), part


@pytest.mark.parametrize("name", REPAIRS.names())
def test_a_layer_without_error_stays_as_it_is(world: World, moe: ConvertedFfn, name: str) -> None:
    exact = replace(moe, top_k=EXPERTS)
    found = repaired(world, exact, name, quick(REPAIRS.get(name)), inputs=world.part(4))
    assert error(world, exact, found) < 1e-4
    if REPAIRS.get(name).keeps != "nothing":  # descent moves by rounding errors
        torch.testing.assert_close(found.down_HP, moe.weights.down_HP, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REPAIRS.names())
def test_no_tokens_no_repair(world: World, moe: ConvertedFfn, name: str) -> None:
    none = replace(world.inputs, x_TH=torch.empty(0, 64), residual_scale_T=torch.empty(0), gradients_TH=None)
    context = replace(world.context(EXPERTS, TOP_K, WIDTH), calibration=none)
    found = made(REPAIRS.get(name)).repair(moe, world.ffn, context)
    assert whole(found) == whole(moe.weights)


@pytest.mark.parametrize("name", REPAIRS.names())
def test_batches_of_the_walk_matter_by_rounding_only(world: World, moe: ConvertedFfn, name: str) -> None:
    few = world.part(4)
    found = [
        repaired(world, moe, name, quick(REPAIRS.get(name)), inputs=replace(few, batch_tokens=size))
        for size in (4096, 100)
    ]
    assert error(world, moe, found[0]) == pytest.approx(error(world, moe, found[1]), rel=1e-3)


@pytest.mark.parametrize("name", FITTED)
def test_a_layer_of_shared_neurons_alone_is_repaired_too(world: World, moe: ConvertedFfn, name: str) -> None:
    """Static pruning has neither experts nor a router."""
    shared = moe.partition.shared
    partition = Partition(np.empty((0, 0), np.int64), shared, np.setdiff1d(np.arange(172), shared))
    weights = ExpertWeights.of_parent(world.ffn, partition)
    pruned = replace(moe, weights=weights, partition=partition, router_NH=torch.empty(0, 64), top_k=0, factor=1.0)
    context = replace(world.context(EXPERTS, TOP_K, WIDTH), num_experts=0, top_k=0, expert_width=0)
    found = made(REPAIRS.get(name), quick(REPAIRS.get(name))).repair(pruned, world.ffn, context)
    assert error(world, pruned, found) <= error(world, pruned, weights) * (1 + 1e-6)


# ---- an effect ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(world: World, moe: ConvertedFfn) -> dict[str, ExpertWeights]:
    """Of every repair, with default options, on all tokens."""
    return {name: repaired(world, moe, name) for name in REPAIRS.names()}


@pytest.mark.parametrize("name", FITTED)
def test_the_error_falls(world: World, moe: ConvertedFfn, results: dict[str, ExpertWeights], name: str) -> None:
    """On the tokens that it was fitted to, by more than rounding."""
    assert error(world, moe, results[name]) < 0.998 * error(world, moe, moe.weights)


@pytest.mark.parametrize("name", REPAIRS.names())
def test_its_weights_are_those_of_no_other(
    world: World, moe: ConvertedFfn, results: dict[str, ExpertWeights], name: str
) -> None:
    """Other than every other repair's by more than rounding, and than the parent's unless it needs nothing."""
    mine = results[name].down_HP
    for other, theirs in results.items():
        if other != name:
            assert float((mine - theirs.down_HP).norm()) > 1e-4 * float(mine.norm()), other
    assert (whole(results[name]) == whole(moe.weights)) == (name not in FITTED)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in CASES if o])
def test_every_choice_of_words_has_an_effect(
    world: World, moe: ConvertedFfn, name: str, options: dict[str, Any]
) -> None:
    few, steps = world.part(4), quick(REPAIRS.get(name))
    found = [repaired(world, moe, name, each, inputs=few).down_HP for each in (steps | options, steps)]
    assert float((found[0] - found[1]).norm()) > 1e-5 * float(found[1].norm())
