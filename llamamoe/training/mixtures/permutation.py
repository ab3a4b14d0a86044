"""Permute any number of items in constant memory, computing each position independently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 8


class Permutation:
    """A bijection of ``0 ... n - 1`` that depends on a key.

    A Feistel network on the bits of a number (Luby and Rackoff 1988; the two halves may differ by a bit) permutes the
    next power of two, and a number that falls outside is permuted again until it falls inside ("cycle walking",
    Black and Rogaway 2002): fewer than two passes on average. Not for secrets: the round function is a hash.

    The same key gives the same permutation on every machine and with every version of numpy.

    Args:
        n: Number of items, from 1 to 2**62.
        key: Numbers from 0 to 2**64 - 1, such as seed and epoch; every one matters, and so does their order.
    """

    def __init__(self, n: int, *key: int) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"a permutation of {n} things")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        low = bits // 2
        self.halves = np.array([low, (1 << low) - 1, (1 << (bits - low)) - 1], dtype=np.uint64)
        # The count first, because numpy ignores zeros at the end.
        words = [len(key), *(part for number in key for part in (number & 0xFFFFFFFF, number >> 32))]
        self.keys = np.random.SeedSequence(words).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the items at ``places`` (0 to n - 1, any shape), int64 of the same shape."""
        flat = np.asarray(places).reshape(-1)
        return permute([self], np.zeros(len(flat), np.int64), flat).reshape(np.shape(places))


def permute(permutations: Sequence[Permutation], which_B: np.ndarray, places_B: np.ndarray) -> np.ndarray:
    """Return the items at ``places_B[i]`` of permutation ``which_B[i]``, int64 [B].

    Raises:
        IndexError: A place is outside its permutation.
    """
    size_B = np.array([each.n for each in permutations], dtype=np.int64)[which_B]
    if not ((places_B >= 0) & (places_B < size_B)).all():
        raise IndexError("a place outside 0 ... n - 1")
    halves_3B = np.stack([each.halves for each in permutations], axis=1)[:, which_B]
    keys_RB = np.stack([each.keys for each in permutations], axis=1)[:, which_B]
    size_B = size_B.astype(np.uint64)
    value_B = _network(places_B.astype(np.uint64), halves_3B, keys_RB)
    outside = np.flatnonzero(value_B >= size_B)
    while len(outside):
        value_B[outside] = _network(value_B[outside], halves_3B[:, outside], keys_RB[:, outside])
        outside = outside[value_B[outside] >= size_B[outside]]
    return value_B.astype(np.int64)


def _network(value_B: np.ndarray, halves_3B: np.ndarray, keys_RB: np.ndarray) -> np.ndarray:
    shift_B, low_mask_B, high_mask_B = halves_3B
    low_B, high_B = value_B & low_mask_B, value_B >> shift_B
    for number, key_B in enumerate(keys_RB):
        if number % 2:
            high_B = high_B ^ (_mix(low_B, key_B) & high_mask_B)
        else:
            low_B = low_B ^ (_mix(high_B, key_B) & low_mask_B)
    found: np.ndarray = (high_B << shift_B) | low_B
    return found


def _mix(value_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
    """Return a hash of 64 bits (the finaliser of SplitMix64, Steele et al. 2014); integers wrap around."""
    value_B = value_B + key_B
    value_B = (value_B ^ (value_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_B = (value_B ^ (value_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_B: np.ndarray = value_B ^ (value_B >> np.uint64(31))
    return mixed_B
