"""The sampler of global batches."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.errors import RefusedError, UsageError
from llamamoe.training.mixtures.permutation import Permutation
from llamamoe.training.mixtures.sampler import MixtureSampler

BLOCKS = {"arxiv": 40, "book": 7, "c4": 300, "empty": 0}
WEIGHTS = {"arxiv": 0.1, "book": 0.2, "c4": 0.7}


def sampler(**keys: Any) -> MixtureSampler:
    return MixtureSampler(**({"num_blocks": BLOCKS, "weights": WEIGHTS, "batch_size": 16, "seed": 5} | keys))


def pairs(one: MixtureSampler, step: int) -> list[tuple[str, int]]:
    domains, blocks = one.batch(step)
    return [(one.names[d], b) for d, b in zip(domains.tolist(), blocks.tolist(), strict=True)]


def plain(steps: int, changes: dict[int, dict[str, float]], batch_size: int, seed: int) -> list[list[tuple[str, int]]]:
    """The same, one sequence at a time."""
    visits: Counter[str] = Counter()
    batches, weights = [], changes[0]
    for step in range(steps):
        weights = changes.get(step, weights)
        total = sum(weights.get(name, 0) for name in BLOCKS)
        u = np.random.Generator(np.random.Philox(key=seed, counter=step)).random()
        batch = []
        for i in range(batch_size):
            place, below = (i + u) / batch_size, 0.0
            for name in BLOCKS:
                below += weights.get(name, 0) / total
                if place < below:
                    break
            epoch, at = divmod(visits[name], BLOCKS[name])
            number = list(BLOCKS).index(name)
            batch.append((name, int(Permutation(BLOCKS[name], seed, number, epoch)(np.array([at]))[0])))
            visits[name] += 1
        raw = np.random.Philox(key=seed, counter=[0, step, 0, 1]).random_raw(batch_size).tolist()
        order = sorted(range(batch_size), key=raw.__getitem__)
        batches.append([batch[i] for i in order])
    return batches


def test_against_one_sequence_at_a_time():
    one = sampler()
    one.set_weights({"book": 1.0, "arxiv": 1.0}, from_step=6)
    want = plain(12, {0: WEIGHTS, 6: {"book": 1.0, "arxiv": 1.0}}, 16, 5)
    assert [pairs(one, step) for step in range(12)] == want


def test_every_block_once_an_epoch_and_each_epoch_in_another_order():
    one = sampler(weights={"book": 1.0}, batch_size=1)
    epochs = [tuple(int(one.batch(7 * epoch + i).block_B[0]) for i in range(7)) for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 6
    many = sampler(weights={"book": 1.0}, batch_size=21).batch(0).block_B.tolist()  # three epochs in one batch
    assert sorted(many) == sorted(3 * list(range(7)))


@given(
    weights=st.lists(st.floats(0, 1) | st.just(0.0), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60)
def test_shares_are_the_whole_numbers_beside_the_weights_and_zero_is_never_drawn(weights, batch_size, seed):
    names = [f"d{i}" for i in range(len(weights))]
    one = MixtureSampler(dict.fromkeys(names, 3), dict(zip(names, weights, strict=True)), batch_size, seed)
    for step in (0, 1, 1000):
        counts = np.bincount(one.batch(step).domain_B, minlength=len(names))
        assert counts.sum() == batch_size
        for count, weight in zip(counts, weights, strict=True):
            exact = batch_size * weight / math.fsum(weights)
            assert math.floor(exact - 1e-9) <= count <= math.ceil(exact + 1e-9)
            assert weight > 0 or count == 0


def test_the_expectation_is_the_weight_and_the_variance_is_small():
    one = sampler(batch_size=4)
    counts = np.array([one._drawn(one._weights(0), step, 1)[0] for step in range(4000)])
    mean = counts.mean(0) / 4
    for name, share in zip(one.names, mean, strict=True):
        assert share == pytest.approx(WEIGHTS.get(name, 0.0), abs=0.01)
    multinomial = 4 * 0.7 * 0.3
    assert counts[:, 2].var() < multinomial / 4


@pytest.mark.parametrize("world", [2, 4])
def test_slices_of_ranks_make_up_the_same_global_batch(world):
    whole = pairs(sampler(), 0)
    ranks = [sampler() for _ in range(world)]
    parts = [pairs(each, 0)[rank::world] for rank, each in enumerate(ranks)]
    assert sorted(pair for part in parts for pair in part) == sorted(whole)
    assert all({name for name, _ in part} >= {"c4"} for part in parts), "the order within a batch is shuffled"


def test_any_step_at_any_time():
    one, other = sampler(), sampler()
    for each in (one, other):
        each.set_weights({"c4": 1.0, "book": 3.0}, from_step=20)
    straight = [pairs(one, step) for step in range(50)]
    for step in (49, 3, 20, 19, 48, 0, 21):
        assert pairs(other, step) == straight[step]
    consumed = Counter(name for batch in straight[:37] for name, _ in batch)
    assert other.consumed(37) == {name: consumed[name] for name in BLOCKS}


def test_counting_many_steps_is_the_same_as_walking(monkeypatch):
    monkeypatch.setattr("llamamoe.training.mixtures.sampler._STEPS_AT_ONCE", 7)
    one = sampler()
    one.set_weights({"arxiv": 1.0, "c4": 0.3}, from_step=31)
    walked = Counter(name for step in range(45) for name, _ in pairs(one, step))
    assert sampler_with_log(one).consumed(45) == {name: walked[name] for name in BLOCKS}


def sampler_with_log(other: MixtureSampler) -> MixtureSampler:
    fresh = sampler()
    for start, weights in other.state_dict()["weights"]:
        fresh.set_weights(weights, start)
    return fresh


# ---- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 9, 10, 14])
def test_exact_after_a_stop_through_json(stop):
    one = sampler()
    one.set_weights({"arxiv": 0.123456789, "c4": 0.7, "book": 1 / 3}, from_step=10)
    straight = [pairs(one, step) for step in range(20)]
    state = json.loads(json.dumps(one.state_dict(stop)))
    other = sampler(weights={"book": 1.0})  # whatever it began with
    other.load_state_dict(state)
    assert [pairs(other, step) for step in range(stop, 20)] == straight[stop:]
    assert other.state_dict(stop) == state


def test_the_state_without_a_step_is_what_was_drawn():
    one = sampler()
    for step in range(4):
        one.batch(step)
    state = one.state_dict()
    assert state["step"] == 4
    assert sum(state["consumed"].values()) == 4 * 16
    json.dumps(state)


def test_weights_change_only_for_what_is_not_drawn():
    one = sampler()
    for step in range(5):
        one.batch(step)
    with pytest.raises(UsageError, match="steps up to 4 are drawn already") as caught:
        one.set_weights({"c4": 1.0}, from_step=4)
    assert "from step 5" in (caught.value.hint or "")
    one.set_weights({"c4": 1.0}, from_step=7)
    one.set_weights({"book": 1.0}, from_step=5)
    assert [one.weights_at(step)["book"] for step in (4, 5, 6, 7)] == [pytest.approx(0.2), 1.0, 1.0, 0.0]
    one.set_weights({"arxiv": 1.0}, from_step=7)  # in the place of the other
    assert [one.weights_at(7)[name] for name in ("c4", "arxiv")] == [0.0, 1.0]
    fresh = sampler()
    fresh.load_state_dict(one.state_dict())
    with pytest.raises(UsageError, match="drawn already"):
        fresh.set_weights({"c4": 1.0}, from_step=4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_blocks": BLOCKS | {"c4": 299}}, "num_blocks"),
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 6}, "seed"),
    ],
)
def test_a_state_of_something_else_is_refused(keys, message):
    with pytest.raises(RefusedError, match=message):
        sampler(**keys).load_state_dict(sampler().state_dict())


def test_a_state_that_contradicts_itself_changes_nothing():
    one = sampler()
    one.batch(0)
    state = one.state_dict()
    state["consumed"]["c4"] += 1
    other = sampler()
    with pytest.raises(RefusedError, match="contradicts itself"):
        other.load_state_dict(state)
    assert pairs(other, 0) == pairs(sampler(), 0)


# ---- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"empty": 0.5, "c4": 0.5}, "'empty' has the weight 0.5, but its text is shorter than one block"),
        ({"c5": 1.0}, "There is no domain 'c5'"),
        ({"c4": -1.0}, "is -1.0"),
        ({"c4": math.nan}, "is nan"),
        ({"c4": 0.0}, "All weights of the mixture are zero"),
        ({}, "All weights of the mixture are zero"),
    ],
)
def test_weights_that_cannot_be(weights, message):
    with pytest.raises(UsageError, match=message):
        sampler(weights=weights)
    with pytest.raises(UsageError, match=message):
        sampler().set_weights(weights, 3)


def test_sizes_that_cannot_be():
    with pytest.raises(UsageError, match="at least 1"):
        sampler(batch_size=0)
    with pytest.raises(UsageError, match="no step -1"):
        sampler().batch(-1)
