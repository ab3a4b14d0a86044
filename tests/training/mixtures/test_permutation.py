from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.training.mixtures.permutation import ROUNDS, Permutation

SEEDS = st.integers(0, 2**63 - 1)


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
@settings(max_examples=80)
def test_a_bijection_for_any_size(n, seed, epoch):
    assert np.array_equal(np.sort(Permutation(n, seed, epoch)(np.arange(n))), np.arange(n))


@given(n=st.integers(2**31, 2**62), seed=SEEDS, data=st.data())
@settings(max_examples=40)
def test_large_sizes_stay_inside_and_apart(n, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=50, unique=True)))
    values = Permutation(n, seed)(places)
    assert 0 <= values.min() <= values.max() < n
    assert len(np.unique(values)) == len(places)
    assert Permutation(n, seed)(places[:1])[0] == values[0], "random access"


def test_plainly():
    """The network written out, one number at a time, in Python's own integers."""
    n, key = 1000, (7, 2**40 + 3)
    keys = [int(k) for k in np.random.SeedSequence([2, 7, 0, 3, 256]).generate_state(ROUNDS, np.uint64)]

    def mix(value: int, k: int) -> int:
        value = (value + k) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def network(value: int) -> int:
        low, high = value % 32, value // 32
        for number, k in enumerate(keys):
            if number % 2:
                high ^= mix(low, k) % 32
            else:
                low ^= mix(high, k) % 32
        return high * 32 + low

    def plain(place: int) -> int:
        value = network(place)
        while value >= n:
            value = network(value)
        return value

    assert Permutation(n, *key)(np.arange(n)).tolist() == [plain(i) for i in range(n)]


def test_another_key_gives_another_permutation():
    orders = [Permutation(500, *key)(np.arange(500)) for key in ((0, 0), (0, 1), (1, 0), (0, 2**32), (2**32, 0), (0,))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.05


@pytest.mark.parametrize("n", [2, 5, 64, 100])
def test_every_place_is_as_likely(n):
    """Pearson's statistic of where two places go, over 1500 seeds: its mean is n - 1, its deviation sqrt(2 (n - 1))."""
    count = 1500
    found = np.array([Permutation(n, seed)(np.array([0, n - 1])) for seed in range(count)])
    for column in found.T:
        observed = np.bincount(column, minlength=n)
        statistic = ((observed - count / n) ** 2 / (count / n)).sum()
        assert statistic < n - 1 + 5 * (2 * (n - 1)) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    values = Permutation(10_000, 3)(np.arange(10_000))
    assert (np.abs(np.diff(values)) == 1).mean() < 0.002
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


def test_shapes_and_misuse():
    permutation = Permutation(6, 1)
    assert permutation(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation(np.empty(0, np.int64)).shape == (0,)
    assert len(permutation) == 6
    for places in ([6], [-1]):
        with pytest.raises(IndexError):
            permutation(np.array(places))
    with pytest.raises(ValueError, match="0 things"):
        Permutation(0, 1)
