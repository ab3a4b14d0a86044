from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from llamamoe.data.files import find_files
from llamamoe.data.text import Document, read_documents
from llamamoe.errors import LlamaMoeError, MissingExtraError, UsageError
from tests.paths import SHARED_DATA, needs_shared_data

ROWS = [
    {"text": "first\nline é"},
    {"text": "  second 🙂  ", "meta": {"redpajama_set_name": "RedPajamaArXiv"}},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts(*patterns: str | Path) -> list[str]:
    return [document.text for document in read_documents(patterns)]


def write(path: Path, data: bytes | str = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def compress(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    if suffix.endswith(".zst"):
        return pytest.importorskip("zstandard").compress(data)
    return data


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_keep_text_exactly_and_name_their_line(tmp_path, suffix):
    path = write(tmp_path / f"wiki{suffix}", compress(LINES + b"\n", suffix))
    assert list(read_documents([path])) == [
        Document("first\nline é", "wiki", f"{path}:1"),
        Document("  second 🙂  ", "arxiv", f"{path}:2"),
    ]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = write(tmp_path / f"story{suffix}", compress("a\r\n\nbé".encode(), suffix))
    assert list(read_documents([path])) == [Document("a\r\n\nbé", "story", str(path))]


def test_a_byte_order_mark_is_no_text(tmp_path):
    bom = b"\xef\xbb\xbf"
    assert texts(write(tmp_path / "a.txt", bom + b"x"), write(tmp_path / "a.jsonl", bom + LINES))[:2] == [
        "x",
        "first\nline é",
    ]


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {i}", "meta": {"redpajama_set_name": "RedPajamaC4"}, "id": i} for i in range(1000)]
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=300)
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == [row["text"] for row in rows]
    assert documents[999].domain == "c4"
    assert documents[999].origin == f"{path}: row 1000"

    parquet.write_table(arrow.table({"content": ["a"]}), path)
    with pytest.raises(LlamaMoeError, match=r"x\.parquet' has no column 'text'; it has content"):
        texts(path)
    parquet.write_table(arrow.table({"text": ["a", None]}), path)
    with pytest.raises(LlamaMoeError, match=r"row 2: the field 'text' is of type NoneType"):
        texts(path)
    write(path, path.read_bytes()[:-20])
    with pytest.raises(LlamaMoeError, match="not a valid Parquet file"):
        texts(path)


def test_files_folders_and_globs_in_a_fixed_order_each_once(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/x.jsonl", "README.md", "b/.hidden.txt", ".cache/z.txt"):
        write(tmp_path / name, LINES if name.endswith("jsonl") else name)
    assert texts(tmp_path) == ["first\nline é", "  second 🙂  ", "b/10.txt", "b/2.txt"]
    assert texts(f"{tmp_path}/b/*.txt") == ["b/10.txt", "b/2.txt"]
    assert texts(f"{tmp_path}/**/2.txt", tmp_path / "b") == ["b/2.txt", "b/10.txt"]
    assert texts(f"{tmp_path}/[ab]") == texts(tmp_path)  # a glob that matches folders only
    assert texts(write(tmp_path / "[1].txt", "brackets")) == ["brackets"]
    assert [d.text for d in read_documents(str(tmp_path / "b/2.txt"))] == ["b/2.txt"]


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("tales/part-0001.jsonl", "tales"),
        ("tales/train/part-00000-of-00007.jsonl", "tales"),
        ("tales/valid.jsonl", "tales"),
        ("tales/0003.jsonl", "tales"),
        ("tales/example_train_12.jsonl", "tales"),
        ("train/c4.jsonl", "c4"),
        ("train/part-time-jobs.jsonl", "part-time-jobs"),
        ("train/my.book.jsonl", "my.book"),
    ],
)
def test_the_domain_is_the_file_or_the_nearest_folder_that_says_something(tmp_path, name, domain):
    path = write(tmp_path / name)
    assert [document.domain for document in read_documents([path])] == [domain, "arxiv"]


def test_text_files_of_a_folder_share_its_domain_and_named_ones_have_their_own(tmp_path):
    paths = [write(tmp_path / "tales" / f"{name}.txt", name) for name in ("wolf", "fox")]
    assert {document.domain for document in read_documents([tmp_path])} == {"tales"}
    assert [document.domain for document in read_documents(paths)] == ["wolf", "fox"]


def test_an_unknown_set_name_is_the_domain_itself(tmp_path):
    row = {"text": "x", "meta": {"redpajama_set_name": "MyLaw"}}
    assert next(read_documents([write(tmp_path / "a.jsonl", json.dumps(row))])).domain == "MyLaw"


def test_what_is_wrong_with_the_call_is_said_before_reading(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="No text was given"):
        read_documents([])
    with pytest.raises(UsageError, match=r"matches '.*nowhere/\*\.txt'"):
        read_documents([tmp_path / "nowhere/*.txt"])
    with pytest.raises(UsageError, match="folders are separated by /"):
        read_documents([r"texts\a.txt"])
    with pytest.raises(UsageError, match="holds no text"):
        read_documents([tmp_path])
    with pytest.raises(UsageError, match=r"format of '.*notes\.docx'"):
        read_documents([write(tmp_path / "notes.docx")])
    write(tmp_path / "a.jsonl.zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llamamoe\[data\]'"):
        read_documents([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl:3: the line is not JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a\.jsonl:3: the line is not JSON"),
        (b"[" * 100_000, r"a\.jsonl:3: the line is not JSON"),
        (b'["a"]', r"a\.jsonl:3: the line is a JSON list"),
        (
            b'{"content": "a", "id": 1}',
            r"a\.jsonl:3: the field 'text' is missing; the fields are content, id",
        ),
        (b'{"text": 5}', r"a\.jsonl:3: the field 'text' is of type int"),
        (b'{"text": " \\n"}', r"a\.jsonl:3: the text is empty"),
        (b'{"text": "\\ud83d"}', r"a\.jsonl:3: the text holds half a surrogate pair"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: byte 11 is not UTF-8 \(0xff"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", LINES + line + b"\n" + LINES)
    with pytest.raises(LlamaMoeError, match=message) as caught:
        texts(path)
    assert caught.value.hint


def test_broken_text_files(tmp_path):
    with pytest.raises(LlamaMoeError, match=r"a\.txt: the text is empty"):
        texts(write(tmp_path / "a.txt", "\n"))
    with pytest.raises(LlamaMoeError, match=r"a\.txt: byte 3 is not UTF-8"):
        texts(write(tmp_path / "a.txt", b"ab\xe9"))
    documents = read_documents([write(tmp_path / "a.jsonl")])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(LlamaMoeError, match=r"Cannot read '.*a\.jsonl'"):
        next(documents)


def noise() -> bytes:
    """Rows that do not compress, so that a cut is far from the end of what was read."""
    rng = random.Random(0)
    return b"".join(json.dumps({"text": f"{rng.random()}"}).encode() + b"\n" for _ in range(20_000))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.5, -1])
def test_a_truncated_archive_is_an_error_after_its_whole_lines(tmp_path, suffix, kept):
    whole = compress(noise(), suffix)
    path = write(tmp_path / f"a{suffix}", whole[: kept if kept < 0 else int(len(whole) * kept)])
    with pytest.raises(LlamaMoeError, match=r"cut short or damaged|not JSON"):
        texts(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_an_archive_of_something_else_is_an_error(tmp_path, suffix):
    with pytest.raises(LlamaMoeError, match=re.escape(f"a{suffix}")):
        texts(write(tmp_path / f"a{suffix}", b"plain text, not compressed at all"))


def test_zstandard_files_of_several_frames_read_to_their_end(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    streamed = io.BytesIO()  # a frame that does not state its size
    with zstandard.ZstdCompressor().stream_writer(streamed, closefd=False) as writer:
        writer.write(LINES)
    frames = [zstandard.compress(LINES[:7]), zstandard.compress(LINES[7:]), streamed.getvalue()]
    path = write(tmp_path / "a.jsonl.zst", b"".join(frames))
    assert texts(path) == [row["text"] for row in ROWS] * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_large_file_is_never_in_memory(tmp_path, suffix):
    rng = random.Random(0)
    rows = (json.dumps({"text": rng.randbytes(1000).hex()}).encode() for _ in range(10_000))  # 20 MB
    path = write(tmp_path / f"a{suffix}", compress(b"\n".join(rows), suffix))
    tracemalloc.start()
    count = sum(1 for _ in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 4e6


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_that_is_too_large_is_named_or_left_out(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("llamamoe.data.text.MAX_DOCUMENT_BYTES", 1000)
    long = json.dumps({"text": "x" * 5000}).encode() + b"\n"
    path = write(tmp_path / f"a{suffix}", compress(LINES + long + LINES + long[:-1], suffix))
    with pytest.raises(LlamaMoeError, match=r"a\.jsonl.*:3: the document is larger than 1,000 bytes") as caught:
        texts(path)
    assert caught.value.hint
    bad: list[str] = []
    kept = [d.origin for d in read_documents([path], on_bad_row=lambda error: bad.append(error.message))]
    assert [origin.rsplit(":")[-1] for origin in kept] == ["1", "2", "4", "5"]
    assert [message.split(": ")[0].rsplit(":")[-1] for message in bad] == ["3", "6"]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_text_file_of_the_largest_size_is_read_and_no_larger_one(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("llamamoe.data.text.MAX_DOCUMENT_BYTES", 1000)
    assert texts(write(tmp_path / f"a{suffix}", compress(b"x" * 1000, suffix))) == ["x" * 1000]
    with pytest.raises(LlamaMoeError, match=r"b\.txt.*: the document is larger than 1,000 bytes"):
        texts(write(tmp_path / f"b{suffix}", compress(b"x" * 1001, suffix)))


def test_a_parquet_row_that_is_too_large_is_named(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("llamamoe.data.text.MAX_DOCUMENT_BYTES", 1000)
    noise = random.Random(0).randbytes(2000).hex()
    parquet.write_table(arrow.table({"text": ["a", noise, "b"]}), tmp_path / "a.parquet")
    with pytest.raises(LlamaMoeError, match=r"a\.parquet: row 2: the document is larger than 1,000 bytes"):
        texts(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": ["x" * 10_000_000]}), tmp_path / "b.parquet", compression="zstd")
    with pytest.raises(LlamaMoeError, match=r"b\.parquet': [\d,]+ bytes of the column 'text' unpack to 10,0"):
        texts(tmp_path / "b.parquet")


def test_one_entry_of_a_parquet_dictionary_in_many_rows_is_not_decoded_at_once(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * 400), ["x" * (16 << 20)])  # 6.7 GB
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    arrow.default_memory_pool().release_unused()
    rows = read_documents([tmp_path / "a.parquet"])
    assert len(next(rows).text) == 16 << 20
    assert arrow.total_allocated_bytes() < 256 << 20


_PEAK = """
import pathlib, sys
from llamamoe.data.text import read_documents
try:
    next(read_documents(sys.argv[1:]))
except Exception as error:
    print(error)
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in KiB")
def test_a_small_file_that_unpacks_to_gigabytes_takes_little_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "bomb.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(64):
            writer.write(b"x" * (16 << 20))
    out = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    message, *_, peak = out.stdout.splitlines()
    assert "bomb.jsonl.zst:1: the document is larger than 67,108,864 bytes" in message
    assert int(peak) < 400 << 10


def test_a_window_beyond_the_bound_is_refused_and_that_of_long_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")

    def packed(log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(
            window_log=log, hash_log=6, chain_log=6, search_log=1, strategy=1, write_content_size=False
        )
        out = io.BytesIO()
        with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(out, closefd=False) as writer:
            writer.write(LINES)
        return out.getvalue()

    assert len(texts(write(tmp_path / "a.jsonl.zst", packed(27)))) == len(ROWS)
    with pytest.raises(LlamaMoeError, match=r"b\.jsonl\.zst' needs a window of more than 128 MiB"):
        texts(write(tmp_path / "b.jsonl.zst", packed(28)))


@needs_shared_data
def test_slimpajama_and_tinystories():
    pytest.importorskip("zstandard")
    domains = [document.domain for document in read_documents([SHARED_DATA / "slimpajama" / "valid"])]
    assert list(dict.fromkeys(domains)) == [
        "arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia",
    ]  # fmt: skip
    assert len(domains) == 675
    relative = os.path.relpath(SHARED_DATA / "tinystories" / "valid.jsonl")
    assert [document.domain for document in read_documents([relative])] == ["TinyStories"] * 200
    assert find_files([relative])[0] == (Path(relative), "tinystories")


def test_a_listing_names_the_package_that_reading_will_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl.zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llamamoe\[data\]'"):
        find_files([tmp_path])
