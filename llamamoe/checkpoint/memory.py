"""Reuse memory for large arrays, because the system clears every page that it hands out.

A conversion repeatedly reads and creates arrays of few sizes. Clearing fresh memory for each would take more time than
reading and sorting the weights.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..lazy import np

MOST_BYTES = 512 * 2**20
"""Total size, in use or free, beyond which free blocks are returned to the system."""
_SMALL = 2**20  # numpy and the C library reuse these themselves


class _Loan(weakref.ref[Any]):
    """A reference to an array, with the block of memory that the array is in."""

    block: np.ndarray[Any, Any]


class _Memory:
    """Blocks of memory, each reused once nothing refers to the array in it."""

    def __init__(self) -> None:
        self._bytes = 0  # of all blocks that exist
        self._free: list[np.ndarray[Any, Any]] = []  # oldest first
        # arrays are freed in any thread at any moment, so that only an append is safe
        self._returned: deque[Any] = deque()
        self._lent: dict[int, _Loan] = {}

    def empty(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        block = self._block(nbytes)
        # a memoryview, not a slice: a view of a view of an array refers to the first array only
        array = np.frombuffer(memoryview(block), np.uint8)  # type: ignore[arg-type]
        # not weakref.finalize: Python ignores exceptions in it, so that Ctrl-C could be lost there; append is written in C
        loan = _Loan(array, self._returned.append)
        loan.block = block
        self._lent[id(loan)] = loan
        return array

    def _block(self, nbytes: int) -> np.ndarray[Any, Any]:
        while self._returned:
            self._free.append(self._lent.pop(id(self._returned.popleft())).block)
        # the latest may still be in the processor's cache
        index = next((i for i in reversed(range(len(self._free))) if self._free[i].nbytes == nbytes), None)
        again = None if index is None else self._free.pop(index)
        self._bytes += nbytes if again is None else 0
        while self._free and self._bytes > MOST_BYTES:
            self._bytes -= self._free.pop(0).nbytes
        return np.empty(nbytes, np.uint8) if again is None else again


_MEMORY: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let `empty_bytes` reuse memory whose arrays are gone, until the block ends."""
    before = _MEMORY.set(_Memory())
    try:
        yield
    finally:
        _MEMORY.reset(before)


def empty_bytes(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an array uint8 ``[nbytes]`` with arbitrary contents; see `reused_memory`."""
    memory = _MEMORY.get()
    return np.empty(nbytes, np.uint8) if memory is None or nbytes < _SMALL else memory.empty(nbytes)
