"""Memory that is used again: never while something refers to it, and bounded."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llamamoe
from llamamoe.checkpoint import memory as module
from llamamoe.checkpoint.memory import empty_bytes, reused_memory
from llamamoe.checkpoint.writer import CheckpointWriter, tensor_bytes
from llamamoe.conversion.assembly import take
from tests.dense import make_dense

SIZE = 2**20


def address(array: np.ndarray[Any, Any]) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


def views(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    tensor = torch.from_numpy(array).view(torch.bfloat16).reshape(-1, 64)
    return {
        "array": array,
        "view of a view": array[:-8].view(np.int16).reshape(-1, 4)[1:],
        "tensor": tensor,
        "part of a tensor": tensor[3:, :2],
        "bytes": tensor_bytes(tensor),
        "memoryview": memoryview(array)[5:9],  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("kind", ["array", "view of a view", "tensor", "part of a tensor", "bytes", "memoryview"])
def test_memory_is_given_again_once_nothing_refers_to_it(kind: str) -> None:
    with reused_memory():
        first = empty_bytes(SIZE)
        where, kept = address(first), views(first)[kind]
        del first
        other = empty_bytes(SIZE)
        assert address(other) != where
        del kept
        again = empty_bytes(SIZE)
        assert address(again) == where
        assert again.flags.writeable


def test_only_within_the_block_and_only_the_same_size() -> None:
    with reused_memory():
        where = address(empty_bytes(SIZE))
        assert address(empty_bytes(SIZE)) == where
        kept = empty_bytes(SIZE + 1)
        assert kept.nbytes == SIZE + 1
    assert module._MEMORY.get() is None
    kept[:] = 7  # it outlives the block
    assert kept.min() == 7
    assert empty_bytes(3).nbytes == 3


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=20, max_size=60))
def test_memory_that_waits_is_bounded(steps: list[tuple[int, int]]) -> None:
    memory, live = module._Memory(), dict[int, Any]()
    most, module.MOST_BYTES = module.MOST_BYTES, 1000
    try:
        for i, (size, keep) in enumerate(steps):
            live[i] = memory.empty(size * 100)
            live[i][:] = i
            waiting = sum(block.nbytes for block in memory._free)
            assert memory._bytes == waiting + sum(array.nbytes for array in live.values())
            assert memory._bytes <= 1000 or not waiting
            for old in list(live)[: max(0, len(live) - keep)]:
                assert (live[old] == old).all(), "nobody else wrote into it"
                del live[old]
    finally:
        module.MOST_BYTES = most


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_conversion_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    dense, reused = make_dense(tmp_path / "dense"), [0]
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2, "dtype": dtype})
    want = llamamoe.split(dense, tmp_path / "want", recipe, verify=False).receipt["weights_sha256"]
    block = module._Memory._block

    def filled(self: module._Memory, nbytes: int) -> np.ndarray[Any, Any]:
        before = self._bytes
        found = block(self, nbytes)
        reused[0] += self._bytes == before
        found[:] = 0xFF  # should a byte of it be left in the result
        return found

    put = CheckpointWriter.put

    def put_and_wait(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        put(self, name, tensor)
        self.flush()  # so that what was written waits to be used again, however busy the machine is

    monkeypatch.setattr(CheckpointWriter, "put", put_and_wait)
    monkeypatch.setattr(module._Memory, "_block", filled)
    monkeypatch.setattr(module, "_SMALL", 1)
    found = llamamoe.split(dense, tmp_path / "found", recipe, verify=False)
    assert found.receipt["weights_sha256"] == want
    assert reused[0] > 10


def test_taken_rows_and_columns_are_each_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 1)
    matrix = torch.arange(12.0).reshape(3, 4)
    with reused_memory():
        rows, columns = take(matrix, np.array([2, 0]), 0), take(matrix, np.array([3, -1]), 1)
    assert rows.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert columns.tolist() == [[3, 0], [7, 0], [11, 0]]


def test_no_python_code_runs_when_an_array_is_freed() -> None:
    """An interrupt that arrived in it would be ignored, as Python ignores exceptions in callbacks of weak references."""
    called: list[str] = []

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_qualname)

    with reused_memory():
        array = empty_bytes(2**21)
        sys.setprofile(profile)
        try:
            del array
        finally:
            sys.setprofile(None)
        assert empty_bytes(2**21) is not None
    assert called == []
