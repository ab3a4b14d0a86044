"""Headers are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.checkpoint.headers import read_header
from llamamoe.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: Any, data: bytes = b"\0" * 4) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_good(tmp_path: Path) -> None:
    found = read_header(write(tmp_path / "f", {"__metadata__": {"a": "b"}, "t": ENTRY}))
    assert (found["t"].dtype, found["t"].shape, found["t"].nbytes) == ("F32", (1,), 4)


@pytest.mark.parametrize(
    "header",
    [
        [], 5, None, {"t": 5}, {"t": []}, {"t": {}}, b"", b"{", b"\xff\xfe", b"[" * 100_000,
        *({"t": ENTRY | change} for change in (
            {"dtype": "F4"}, {"dtype": ["F32"]}, {"shape": "ab"}, {"shape": [-1]}, {"shape": [1.0]}, {"shape": [True]},
            {"shape": [2**70]}, {"shape": 5}, {"data_offsets": [0]}, {"data_offsets": [4, 0]}, {"data_offsets": [-4, 0]},
            {"data_offsets": [1, 5]}, {"data_offsets": [0, 8]}, {"data_offsets": "ab"},
        )),
        {"a": ENTRY, "b": ENTRY},
        *({"__metadata__": value, "a": ENTRY} for value in (5, "x", [1], {"format": 64}, {"format": [[]]})),
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 12]}},
    ],
)  # fmt: skip
def test_inconsistent(tmp_path: Path, header: Any) -> None:
    with pytest.raises(CheckpointError, match=r"f\.safetensors"):
        read_header(write(tmp_path / "f.safetensors", header))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("h") / "f"
    path.write_bytes(data)
    try:
        assert read_header(path) == {}
    except CheckpointError:
        return
