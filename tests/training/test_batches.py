"""Ranks together always see the same micro-batches of a step, and so the same sequences."""

from __future__ import annotations

import numpy as np
import pytest

from llamamoe.data.shards import TokenCorpus
from llamamoe.errors import UsageError
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
