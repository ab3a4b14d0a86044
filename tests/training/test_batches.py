"""Ranks together always see the same micro-batches of a step, and so the same sequences."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from llamamoe.data.shards import TokenCorpus
from llamamoe.errors import CheckpointError, UsageError
from llamamoe.training.batches import Layout, TokenBatches
from llamamoe.training.mixtures.sampler import MixtureSampler

from ..dense import make_dense
from .runs import make_tokens

STEPS, BATCH, LENGTH = 3, 16, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    folder = tmp_path_factory.mktemp("tokens")
    return TokenCorpus(make_tokens(folder, make_dense(folder / "dense"), 0))


def batches(corpus: TokenCorpus, micro: int, world: int, rank: int) -> TokenBatches:
    blocks = {name: corpus.num_blocks(name, LENGTH) for name in corpus.domains}
    sampler = MixtureSampler(blocks, dict.fromkeys(corpus.domains, 0.5), BATCH, seed=1)
    return TokenBatches(corpus, sampler, Layout(BATCH, micro, world, rank), LENGTH, STEPS)


@pytest.mark.parametrize(("micro", "world"), [(2, 2), (2, 4), (4, 4), (1, 8), (16, 1)])
def test_all_ranks_together_see_what_one_sees(micro: int, world: int, corpus: TokenCorpus) -> None:
    alone = {each["place"]: each for each in batches(corpus, micro, 1, 0)}
    assert len(alone) == STEPS * BATCH // micro
    seen = {}
    for rank in range(world):
        mine = list(batches(corpus, micro, world, rank))
        assert len(mine) == len(alone) // world
        assert [each["place"][0] for each in mine] == sorted(each["place"][0] for each in mine)
        seen |= {each["place"]: each for each in mine}
    assert seen.keys() == alone.keys()
    for place, each in seen.items():
        for key in ("input_ids", "domains", "blocks"):
            assert np.array_equal(each[key], alone[place][key]), (place, key)


def test_micro_batches_of_a_step_are_the_global_batch_in_order(corpus: TokenCorpus) -> None:
    whole = [each["input_ids"] for each in batches(corpus, BATCH, 1, 0)]
    parts = [each["input_ids"] for each in batches(corpus, 4, 1, 0)]
    for step in range(STEPS):
        assert np.array_equal(np.concatenate(parts[4 * step : 4 * step + 4]), whole[step])


def test_a_batch_that_cannot_be_dealt_says_what_could() -> None:
    with pytest.raises(UsageError, match="cannot be dealt to 3 ranks") as error:
        Layout(16, 2, 3)
    assert "a multiple of 6" in (error.value.hint or "")


class Watched(TokenBatches):
    """Batches that note in which order and thread they are read."""

    def __init__(self, corpus: TokenCorpus, **keys: Any) -> None:
        plain = batches(corpus, 4, 1, 0)
        super().__init__(corpus, plain.sampler, plain.layout, LENGTH, STEPS, **keys)
        self.read: list[tuple[int, int]] = []
        self.threads: set[str] = set()
        self.last_of = [threading.Event() for _ in range(STEPS)]
        self.gone: int | None = None

    def _micro_batch(self, step: int, index: int, domains: np.ndarray, blocks: np.ndarray) -> dict[str, Any]:
        if step == self.gone:
            raise CheckpointError("a shard is gone")
        self.threads.add(threading.current_thread().name)
        self.read.append((step, index))
        if index == 3:
            self.last_of[step].set()
        return super()._micro_batch(step, index, domains, blocks)


def test_the_next_step_is_read_while_the_model_runs(corpus: TokenCorpus) -> None:
    found = Watched(corpus)
    taken = iter(found)
    for _ in range(3):
        next(taken)
    assert {step for step, _ in found.read} == {0}
    next(taken)  # the last of the step, with which the model runs
    assert found.last_of[1].wait(60)
    assert found.read == [(step, index) for step in (0, 1) for index in range(4)]
    assert len(list(taken)) == 8
    assert threading.current_thread().name not in found.threads
    for each in batches(corpus, 4, 1, 0):
        (step, index), drawn = each["place"], batches(corpus, 4, 1, 0).sampler.batch(each["place"][0])
        ids = corpus.gather(drawn.domain_B, drawn.block_B, LENGTH)
        assert np.array_equal(each["input_ids"], ids[4 * index : 4 * index + 4]), step


def test_a_step_whose_mixture_may_change_is_drawn_after_the_change(corpus: TokenCorpus) -> None:
    found = Watched(corpus, changes_every=2)
    taken = iter(found)
    for _ in range(8):
        next(taken)
    only = found.sampler.names[0]
    found.sampler.set_weights({only: 1.0}, 2)  # as after the validation between the steps 1 and 2
    assert {each["domains"].unique().item() for each in taken} == {0}
    fixed = Watched(corpus)
    for _, _ in zip(range(8), fixed, strict=False):
        pass
    with pytest.raises(UsageError, match="drawn already"):
        fixed.sampler.set_weights({only: 1.0}, 2)


def test_an_error_of_reading_is_raised_where_its_step_begins(corpus: TokenCorpus) -> None:
    found = Watched(corpus)
    found.gone = 1
    taken = iter(found)
    assert [next(taken)["place"][0] for _ in range(4)] == [0] * 4
    with pytest.raises(CheckpointError, match="a shard is gone"):
        next(taken)
    assert not any(thread.name in found.threads for thread in threading.enumerate())
