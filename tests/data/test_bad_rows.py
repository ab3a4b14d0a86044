"""Reading on past rows without usable text."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamamoe.data.text import read_documents
from llamamoe.errors import LlamaMoeError


def read(path: Path) -> tuple[list[str], list[str]]:
    bad: list[LlamaMoeError] = []
    texts = [document.text for document in read_documents([path], on_bad_row=bad.append)]
    return texts, [error.message for error in bad]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": \n\n{"text": "\xff"}\n{"text": "\\ud83d"}\n[1]\n{"text": "2"}\n')
    texts, bad = read(path)
    assert texts == ["1", "2"]
    assert [line.split(": ")[0] for line in bad] == [f"{path}:{n}" for n in (2, 4, 5, 6)]
    with pytest.raises(LlamaMoeError, match=r"a\.jsonl:2"):
        list(read_documents([path]))


def test_parquet_and_text_files(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["1", None, " ", "2"]}), tmp_path / "a.parquet")
    texts, bad = read(tmp_path / "a.parquet")
    assert texts == ["1", "2"]
    assert ["row 2" in bad[0], "row 3" in bad[1], len(bad)] == [True, True, 2]
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("fine")
    assert read(tmp_path / "*.txt")[0] == ["fine"]


def test_a_damaged_file_is_an_error_all_the_same(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "1"}\n' * 99)[:-4])
    with pytest.raises(LlamaMoeError, match="cut short"):
        read(tmp_path / "a.jsonl.zst")
    (tmp_path / "b.jsonl").write_text("x")
    (tmp_path / "b.jsonl").chmod(0)
    if not (tmp_path / "b.jsonl").stat().st_uid:  # root reads everything
        return
    with pytest.raises(LlamaMoeError, match="Cannot read"):
        read(tmp_path / "b.jsonl")
