"""Permutations of any number of things in constant memory, each place computed by itself."""

from __future__ import annotations

import numpy as np

ROUNDS = 8


class Permutation:
    """A bijection of ``0 ... n - 1`` that depends on a key.

    A Feistel network on the bits of a number (Luby and Rackoff 1988; the two halves may differ by a bit) permutes the
    next power of two, and a number that falls outside is permuted again until it falls inside ("cycle walking",
    Black and Rogaway 2002): fewer than two passes on average. Not for secrets: the round function is a hash.

    The same key gives the same permutation on every machine and with every version of numpy.

    Args:
        n: How many things, at least 1 and at most 2**62.
        key: Numbers from 0 to 2**64 - 1, such as seed and epoch; every one matters, and so does their order.
    """

    def __init__(self, n: int, *key: int) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"a permutation of {n} things")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low = bits // 2
        self._masks = (np.uint64((1 << self._low) - 1), np.uint64((1 << (bits - self._low)) - 1))
        # The count first: to numpy, zeros at the end are as good as nothing.
        words = [len(key), *(part for number in key for part in (number & 0xFFFFFFFF, number >> 32))]
        self._keys = np.random.SeedSequence(words).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at ``places`` (0 to n - 1, any shape), int64 of the same shape."""
        flat = np.asarray(places).reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.n:
            raise IndexError(f"a place outside 0 ... {self.n - 1}")
        value = self._network(flat.astype(np.uint64))
        outside = np.flatnonzero(value >= self.n)
        while len(outside):
            value[outside] = self._network(value[outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64).reshape(np.shape(places))

    def _network(self, value: np.ndarray) -> np.ndarray:
        shift = np.uint64(self._low)
        low, high = value & self._masks[0], value >> shift
        for number, key in enumerate(self._keys):
            if number % 2:
                high = high ^ (_mix(low, key) & self._masks[1])
            else:
                low = low ^ (_mix(high, key) & self._masks[0])
        return (high << shift) | low


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = value + key
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
