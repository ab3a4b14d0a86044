"""Instruction and preference data of the usual formats as messages, and what is left out or refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llamamoe import LlamaMoeError, RefusedError, UsageError, format_chats


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [says("user", "q"), says("assistant", "a")]
TWICE = [*ASKED, says("user", "r"), says("assistant", "b")]
SYSTEM = says("system", "s")
PREFERRED = {"prompt": [says("user", "q")], "chosen": [says("assistant", "a")], "rejected": [says("assistant", "x")]}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OpenAI": ({"messages": TWICE, "id": 1}, {"messages": TWICE}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"messages": [SYSTEM, *ASKED]},
    ),
    "ShareGPT that begins with an answer and ends with a question": (
        {"conversations": [{"from": each, "value": text} for each, text in
                           (("gpt", "hello"), ("human", "q"), ("gpt", "a"), ("human", "and?"))]},
        {"messages": ASKED},
    ),
    "Firefly": ({"kind": "NLI", "input": "q", "target": "a"}, {"messages": ASKED}),
    "Firefly, several turns": (
        {"conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]}, {"messages": TWICE},
    ),
    "Alpaca": ({"instruction": "do", "input": "this", "output": "done"},
               {"messages": [says("user", "do\nthis"), says("assistant", "done")]}),
    "Alpaca with a history": (
        {"instruction": "r", "input": "", "output": "b", "history": [["q", "a"]], "system": "s"}, {"messages": [SYSTEM, *TWICE]},
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, {"messages": ASKED}),
    "prompt and response": ({"prompt": "q", "response": "a"}, {"messages": ASKED}),
    "prompt with preferences": ({"prompt": "q", "chosen": "a", "rejected": "x"}, PREFERRED),
    "prompt with preferences as messages": (PREFERRED, PREFERRED),
    "UltraFeedback": (
        {"prompt": "q", "chosen": ASKED, "rejected": [ASKED[0], says("assistant", "x")], "score_chosen": 9.0}, PREFERRED,
    ),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b", "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x"},
        {"prompt": TWICE[:3], "chosen": TWICE[3:], "rejected": [says("assistant", "x")]},
    ),
    "ShareGPT with preferences": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "x"}},
        PREFERRED,
    ),
}  # fmt: skip
BAD: dict[str, tuple[Any, str]] = {
    "no known field": ({"text": "a"}, "unknown fields text; known are ShareGPT"),
    "a list": ([1], "the row is of type list"),
    "another role": ({"messages": [says("tool", "a")]}, "the role 'tool'"),
    "no answer": ({"messages": [says("user", "a")]}, "no answer of the assistant"),
    "two questions in a row": ({"messages": [says("user", "a"), *ASKED]}, "message 2 is of user, but assistant"),
    "an empty answer": ({"prompt": "q", "completion": " "}, "message 2 is empty"),
    "a number": ({"prompt": "q", "completion": 3}, "the text of the assistant is of type int"),
    "half a pair": ({"prompt": "q", "completion": "\ud800"}, "half a surrogate pair"),
    "equal answers": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    "an answer to nothing": ({"chosen": ASKED, "rejected": ASKED[:1]}, "rejected answer does not end"),
    "a text without turns": ({"chosen": "a", "rejected": "b"}, "no turns"),
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ROWS)
def test_every_format_becomes_messages(name: str, tmp_path: Path) -> None:
    row, wanted = ROWS[name]
    found = format_chats([write(tmp_path / "in.jsonl", [row])], tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [wanted]
    assert (found.rows, found.left_out) == (1, 0)
    assert found.kind == ("preferences" if "chosen" in wanted else "conversations")
    again = format_chats([tmp_path / "out.jsonl"], tmp_path / "again.jsonl")
    assert read(again.out) == [wanted], "what is written is read as it is"


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_not_usable_are_left_out_and_counted(name: str, tmp_path: Path) -> None:
    row, reason = BAD[name]
    good = ROWS["prompt with preferences"][0] if isinstance(row, dict) and "chosen" in row else ROWS["OpenAI"][0]
    found = format_chats([write(tmp_path / "in.jsonl", [good, row])], tmp_path / "out.jsonl")
    assert (found.rows, found.left_out) == (1, 1)
    assert found.reasons[0].startswith(f"{tmp_path / 'in.jsonl'}:2: ")
    assert reason in found.reasons[0]
    with pytest.raises(RefusedError, match="no row is usable"):
        format_chats([write(tmp_path / "in.jsonl", [row])], tmp_path / "none.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_files_of_all_kinds_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROWS["OpenAI"][0]]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps(rows[0]) + "\n").encode()))
    (tmp_path / "b.json").write_text(json.dumps([ROWS["Alpaca"][0], ROWS["Firefly"][0]]))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = format_chats([tmp_path / name for name in ("a.jsonl.gz", "b.json", "c.parquet")], tmp_path / "out.jsonl")
    assert found.formats == {"OpenAI": 2, "Alpaca": 1, "Firefly": 1}
    assert len(read(found.out)) == 4


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    good = write(tmp_path / "in.jsonl", [ROWS["OpenAI"][0]])
    mixed = write(tmp_path / "mixed.jsonl", [ROWS["OpenAI"][0], ROWS["HH-RLHF"][0]])
    (tmp_path / "broken.jsonl").write_text('{"messages": ')
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    (tmp_path / "there.jsonl").write_text("kept")
    before = sorted(os.listdir(tmp_path))
    for files, out, error, words in (
        ([], "out.jsonl", UsageError, "No file"),
        ([tmp_path / "none.jsonl"], "out.jsonl", UsageError, "is not a file"),
        ([good], "out.json", UsageError, "not the name of a .jsonl"),
        ([good], "in.jsonl", UsageError, "is read and written"),
        ([good], "no/out.jsonl", UsageError, "existing folder"),
        ([good], "there.jsonl", RefusedError, "already exists"),
        ([mixed], "out.jsonl", RefusedError, "conversations .*:1.* and preferences .*:2"),
        ([tmp_path / "broken.jsonl"], "out.jsonl", LlamaMoeError, "broken.jsonl:1 is not JSON"),
        ([tmp_path / "object.json"], "out.jsonl", LlamaMoeError, "not a list of rows"),
        ([tmp_path / "cut.jsonl.gz"], "out.jsonl", LlamaMoeError, "cut.jsonl.gz"),
    ):
        with pytest.raises(error, match=words):
            format_chats(files, tmp_path / out)
    assert sorted(os.listdir(tmp_path)) == before
    assert format_chats([good], tmp_path / "there.jsonl", force=True).rows == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_that_is_too_large_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamamoe.data.format_chats.MAX_DOCUMENT_BYTES", 400)
    rows = [ROWS["OpenAI"][0], {"messages": [says("user", "q"), says("assistant", "a" * 500)]}]
    path = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        write(path, rows)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    with pytest.raises(LlamaMoeError, match=rf"{path}.*2: the row is larger than 400 bytes"):
        format_chats([path], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
