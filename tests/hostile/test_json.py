"""JSON that parsers read differently or cannot pass on: one error that names file and key, whichever file it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamoe.checkpoint.json_files import read_json
from llamamoe.errors import CheckpointError

from .conftest import Refused

FILES = ("config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer_config.json")
BAD = {
    '"odd": 1, "odd": 2': ("'odd'", "twice"),
    '"odd": {"deep": [{"x": 1, "x": 1}]}': ("'x'", "twice"),
    '"odd": "\\ud800"': ("odd", "'\\ud800'", "half a character"),
    '"odd": {"deep": ["a\\udc00b"]}': ("odd.deep.0", "half a character"),
    '"o\\udfffdd": 1': ("o\\udfffdd", "half a character"),
    '"odd": 1' + "0" * 400: ("odd", "401 digits"),
    '"odd": -1' + "0" * 9000: ("odd", "9,001 digits"),
    '"odd": {"deep": [1' + "0" * 101 + "]}": ("odd.deep.0", "102 digits"),
    '"odd": ' + "[" * 200 + "]" * 200: ("odd", "nested more than 64"),
    '"odd": ' + '{"a":' * 90 + "1" + "}" * 90: ("odd", "nested more than 64"),
    '"odd": ' + "[" * 100_000 + "]" * 100_000: ("not valid JSON",),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda text: text[:24])
@pytest.mark.parametrize("name", FILES)
def test_one_error_that_names_file_and_key(sharded: Path, refused: Refused, name: str, bad: str) -> None:
    path = sharded / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data)[:-1] + (", " if data else "") + bad + "}")
    refused(sharded, name, *BAD[bad])


@pytest.mark.parametrize("value", [10**99, 1e300, [[1]], "a\u0301😀", None, True])
def test_what_can_be_passed_on_is_read(tmp_path: Path, value: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": value}))
    assert read_json(tmp_path / "x.json") == {"a": value}


def test_a_vocabulary_may_be_odd_but_not_broken(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"a": 1, "a": 2}')
    assert read_json(path, vocabulary=True) == {"a": 2}
    path.write_text('{"a": 1, ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path, vocabulary=True)


def test_the_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="at most 268,435,456"):
        read_json(path)
