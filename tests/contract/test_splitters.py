"""Every splitter: what a partition is, what is exact, what decides the result, and that it does something at all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from llamamoe.architectures.rescales import RESCALES
from llamamoe.methods.layer import PADDING, ExpertWeights, FfnWeights, LayerContext, LayerInputs, Partition
from llamamoe.methods.selectors import SELECTORS
from llamamoe.methods.splitters import SPLITTERS
from llamamoe.methods.splitters.base import Splitter
from tests.converted import plain_hidden

from .world import World, check_needs, digest, disturb, made, quick, shown, variants

SIZES = [(4, 2, 0, 0), (8, 2, 43, 5), (5, 1, 1, 0), (16, 4, 0, 8)]
"""N, k, S, and by how much experts are wider than they must be; 172 neurons are divisible by 4 alone."""
NEEDED: dict[str, dict[str, dict[str, Any]]] = {"gradient": {"duplicates": {"overlap": "inner"}}}
"""Options that mean something only together with others."""
NUMBERS: dict[str, list[dict[str, Any]]] = {
    "upcycle": [{"groups": 2}, {"reinit": 0.5}],
    "coactivation": [{"percentile": 30.0}],
}
"""Values of options that are numbers, of which no rule could choose one that matters."""
START = {"learned": "token_clusters"}
"""The start of splitters that keep it unless they find better; on an untrained model they may find nothing."""
CASES = [(name, each) for name in SPLITTERS.names() for each in (*variants(SPLITTERS.get(name), NEEDED.get(name)), *NUMBERS.get(name, []))]  # fmt: skip
SIZED = [(*case, size) for size in SIZES for case in CASES if not made(SPLITTERS.get(case[0]), case[1]).refusals(*size[:2], "soft")]  # fmt: skip
NONE = np.empty(0, np.int64)


def shared_neurons(world: World, splitter: Splitter, count: int) -> np.ndarray:
    """Chosen by the splitter's own default selector."""
    context = world.context(2, 1, 1)
    return made(SELECTORS.get(splitter.default_shared_by)).select(world.ffn, count, context)


def sized(world: World, splitter: Splitter, size: tuple[int, int, int, int], **keys: Any) -> LayerContext:
    """The context that a plan would make of these sizes."""
    num_experts, top_k, shared, spare = size
    if not splitter.routed:
        return replace(world.context(1, 1, 1, **keys), num_experts=0, top_k=0, expert_width=0)
    width = -(-(world.ffn.intermediate_size - shared) // splitter.parts(num_experts)) + spare
    return world.context(num_experts, top_k, width, **keys)


def split(
    world: World, splitter: Splitter, size: tuple[int, int, int, int], ffn: FfnWeights | None = None, **keys: Any
) -> Partition:
    shared = shared_neurons(world, splitter, size[2])
    return splitter.split(ffn or world.ffn, shared, sized(world, splitter, size, **keys))


def facts(partition: Partition) -> str:
    """All that a splitter hands on."""
    rows = NONE if partition.router_NH is None else partition.router_NH
    return digest(partition.experts, partition.shared, partition.omitted, rows)


def grouping(partition: Partition) -> str:
    """Return the sets of neurons that share an expert, whatever its number, and the shared neurons."""
    groups = sorted(sorted(row[row != PADDING].tolist()) for row in partition.experts)
    return digest(groups, partition.shared.tolist())


# ---- what a partition is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "size"), SIZED)
def test_laws_of_a_partition(world: World, name: str, options: dict[str, Any], size: tuple[int, int, int, int]) -> None:
    splitter, few = made(SPLITTERS.get(name), quick(SPLITTERS.get(name)) | options), world.part(3)
    context, shared = sized(world, splitter, size, inputs=few), shared_neurons(world, splitter, size[2])
    partition = splitter.split(world.ffn, shared, context)
    check_places(splitter, partition, context, shared)
    weights = splitter.weights(world.ffn, partition, context)
    parent = ExpertWeights.of_parent(world.ffn, partition)
    check_kept(splitter, partition, weights, parent)
    # Together the experts are the FFN, in float64 with the coefficient of the splitter's rescale, if that is promised.
    parts = max(splitter.parts(context.num_experts), 1)
    coefficient = RESCALES.get(splitter.default_rescale)().coefficient(parts, max(context.num_experts, 1))
    counts_P = np.where(np.arange(len(partition.slots)) < len(partition.shared), 1.0, coefficient)
    weights = weights or parent
    hidden = plain_hidden(weights.gate_PH, weights.up_PH, few.x_TH) * counts_P
    want = plain_hidden(world.ffn.gate_FH, world.ffn.up_FH, few.x_TH) @ world.ffn.down_HF.double().numpy().T
    error = np.abs(hidden @ weights.down_HP.double().numpy().T - want).max() / np.abs(want).max()
    assert error < 1e-12 if splitter.exact else error > 1e-3


def check_places(splitter: Splitter, partition: Partition, context: LayerContext, shared: np.ndarray) -> None:
    """Each neuron stands where and as often as it was declared."""
    partition.check(172, overlap=splitter.overlap)
    for part in (partition.experts, partition.shared, partition.omitted):
        assert part.dtype == np.int64
    assert partition.experts.shape == (context.num_experts, context.expert_width)
    assert len(partition.shared) == len(shared)
    assert splitter.chooses_shared or np.array_equal(partition.shared, shared)
    for part in (partition.shared, partition.omitted, *partition.experts):
        real = part[part != PADDING]
        assert (np.diff(real) > 0).all(), "ascending, each once"
        assert (part[len(real) :] == PADDING).all(), "padding stands last"
    routed = partition.experts[partition.experts != PADDING]
    assert not np.isin(partition.shared, routed).any()
    if splitter.exact:
        copies = context.num_experts // splitter.parts(context.num_experts)
        assert (np.bincount(routed, minlength=172)[np.setdiff1d(np.arange(172), partition.shared)] == copies).all()
        assert not len(partition.omitted)
    assert splitter.overlap or len(np.unique(routed)) == len(routed)
    if partition.router_NH is not None:
        assert (partition.router_NH.dtype, tuple(partition.router_NH.shape)) == (
            torch.float32,
            (context.num_experts, 64),
        )
        assert partition.router_NH.isfinite().all()


def check_kept(splitter: Splitter, partition: Partition, weights: ExpertWeights | None, parent: ExpertWeights) -> None:
    """Neurons that are declared to be the parent's are, bit for bit; padding is zero."""
    if weights is None:
        assert splitter.kept == "neurons"
        return
    pairs = [(getattr(weights, key), getattr(parent, key)) for key in ("gate_PH", "up_PH", "down_HP")]
    for have, want in pairs[: {"neurons": 3, "gate_up": 2, "nothing": 0}[splitter.kept]]:
        assert torch.equal(have, want)
    padding, shared = torch.from_numpy(partition.slots == PADDING), len(partition.shared)
    pairs[2] = pairs[2][0].T, pairs[2][1].T
    for have, want in pairs:
        assert have.dtype == torch.float32
        assert not have[padding].any()
        assert torch.equal(have[:shared], want[:shared]), "shared neurons stay the parent's"


@pytest.mark.parametrize("name", SPLITTERS.names())
def test_weights_of_16_bits_are_partitioned_too(world: World, name: str) -> None:
    half = FfnWeights(
        *(m.bfloat16() for m in (world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF, world.ffn.norm_H))
    )
    splitter = made(SPLITTERS.get(name), quick(SPLITTERS.get(name)))
    partition = split(world, splitter, SIZES[1], half, inputs=world.part(3))
    partition.check(172, overlap=splitter.overlap)
    weights = splitter.weights(half, partition, sized(world, splitter, SIZES[1]))
    assert weights is None or weights.gate_PH.dtype == torch.float32


# ---- what decides the result --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), CASES)
def test_same_seed_same_bytes_whatever_ran_before(world: World, name: str, options: dict[str, Any]) -> None:
    size, few = SIZES[1], world.part(3)
    before = digest(few.x_TH, few.gradients_TH, world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF)
    options = quick(SPLITTERS.get(name)) | options
    once, again = made(SPLITTERS.get(name), options), made(SPLITTERS.get(name), options)
    first = split(world, once, size, inputs=few)
    disturb()
    split(world, once, size, inputs=world.part(2), seed=3)
    second, third = (split(world, each, size, inputs=few) for each in (once, again))
    assert facts(first) == facts(second) == facts(third)
    context = sized(world, once, size)
    start = [each.weights(world.ffn, first, context) for each in (once, again)]
    if start[0] is not None:
        assert start[1] is not None
        assert torch.equal(start[0].down_HP, start[1].down_HP)
    assert before == digest(few.x_TH, few.gradients_TH, world.ffn.gate_FH, world.ffn.up_FH, world.ffn.down_HF)


@pytest.mark.parametrize("name", SPLITTERS.names())
def test_it_looks_at_what_it_needs_and_at_nothing_else(world: World, name: str) -> None:
    """Another result for other weights, activations and gradients as far as it declares that it needs them."""
    cls = SPLITTERS.get(name)
    kept = np.arange(43, dtype=np.int64)

    def result(ffn: FfnWeights, inputs: LayerInputs) -> str:
        splitter = made(cls, quick(cls))
        context = shown(sized(world, splitter, SIZES[1], inputs=inputs), cls.needs)
        return facts(splitter.split(ffn, kept, context))

    check_needs(cls.needs, result, world.ffn, world.part(4), world.part(4, world.other))


# ---- an effect ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(world: World) -> Any:
    """Partition and down projections by name and options, on all tokens, beside as many shared neurons as by default."""

    @cache
    def get(
        name: str, given: tuple[tuple[str, Any], ...] = (), least_shared: int = 0, spare: int = 0
    ) -> tuple[Partition, str]:
        splitter = made(SPLITTERS.get(name), dict(given))
        size = (8, 2, max(round(splitter.default_shared * 172), least_shared), spare)
        partition = split(world, splitter, size)
        weights = splitter.weights(world.ffn, partition, sized(world, splitter, size))
        return partition, digest(None if weights is None else weights.down_HP)

    return get


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("name", SPLITTERS.names())
def test_it_groups_neurons_as_no_other_does(world: World, results: Any, name: str, spare: int) -> None:
    """Not as any other registered splitter, nor as cutting the neurons that are not shared into equal runs does."""
    found = results(name, spare=spare)[0]
    alike = [other for other in SPLITTERS.names() if grouping(results(other, spare=spare)[0]) == grouping(found)]
    kin = {START.get(name), *(each for each, start in START.items() if start == name)}
    assert [other for other in alike if world.trained or other not in kin] == [name]
    rest = np.setdiff1d(np.arange(172), found.shared)
    context = world.context(8, 2, -(-len(rest) // 8))
    runs = Partition.from_labels(rest, np.arange(len(rest)) // context.expert_width, context, found.shared)
    assert grouping(found) != grouping(runs)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in CASES if o])
def test_every_choice_of_words_has_an_effect(results: Any, name: str, options: dict[str, Any]) -> None:
    """Another value of an option gives another partition, or other weights in it."""
    without = {key: value for key, value in options.items() if key in NEEDED.get(name, {}).get(list(options)[-1], {})}
    found = [results(name, tuple(given.items()), 22) for given in (options, without)]
    assert (facts(found[0][0]), found[0][1]) != (facts(found[1][0]), found[1][1])
