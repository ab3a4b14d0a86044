"""The writer: headers that safetensors reads, any order of tensors, bounded memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llamamoe.checkpoint import writer as module
from llamamoe.checkpoint.headers import read_header
from llamamoe.checkpoint.layout import shard_header
from llamamoe.checkpoint.writer import CheckpointWriter

NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), shapes), min_size=1, max_size=6), st.randoms())
def test_safetensors_reads_what_is_written(tmp_path_factory: Any, kinds: list[Any], random: Any) -> None:
    folder = tmp_path_factory.mktemp("w")
    values = {f"t{i}": torch.randn(shape).to(NAMES[dtype]) for i, (dtype, shape) in enumerate(kinds)}
    shard = {f"t{i}": (d, s, values[f"t{i}"].nbytes) for i, (d, s) in enumerate(kinds)}
    order = list(values)
    random.shuffle(order)
    with CheckpointWriter(folder / "out", {"model.safetensors": shard}, fingerprint="x") as writer:
        for name in order:
            writer.put(name, values[name])
        writer.finish("all", order, {})
        writer.flush()
        writer.publish()
    with safe_open(folder / "out" / "model.safetensors", framework="pt") as file:
        for name, value in values.items():
            assert torch.equal(file.get_tensor(name), value)
            assert file.get_tensor(name).dtype == value.dtype
    assert {n: (i.dtype, i.shape) for n, i in read_header(folder / "out" / "model.safetensors").items()} == {
        n: entry[:2] for n, entry in shard.items()
    }


def test_header_is_aligned_and_offsets_are_those_of_the_file() -> None:
    head, starts = shard_header({"a": ("F32", (3,), 12), "empty": ("F32", (0, 5), 0), "b": ("F16", (1,), 2)})
    assert len(head) % 8 == 0
    assert starts == {"a": len(head), "empty": len(head) + 12, "b": len(head) + 12}
    assert json.loads(head[8:])["__metadata__"] == {"format": "pt"}


def test_what_waits_for_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 1000)
    gate, most, real = threading.Event(), [0], module._write_at
    value = torch.zeros(100)
    shard = {f"t{i}": ("F32", (100,), 400) for i in range(20)}
    with CheckpointWriter(tmp_path / "out", {"model.safetensors": shard}, fingerprint="x") as writer:

        def slow(*args: Any) -> None:
            most[0] = max(most[0], writer._waiting)
            gate.wait(0.01)
            real(*args)

        monkeypatch.setattr(module, "_write_at", slow)
        for name in shard:
            writer.put(name, value)
        writer.flush()
    assert 0 < most[0] <= 1400, "the bound, and one tensor more"


def test_wrong_size_is_a_mistake_of_ours(tmp_path: Path) -> None:
    shard = {"a": ("F32", (2,), 8)}
    with (
        CheckpointWriter(tmp_path / "out", {"model.safetensors": shard}, fingerprint="x") as writer,
        pytest.raises(AssertionError, match="planned 8"),
    ):
        writer.put("a", torch.zeros(3))
