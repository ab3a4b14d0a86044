"""``llamamoe.tokenize``: the ids, what is counted, what does not matter, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from llamamoe.data import shard_writer
from llamamoe.data.token_merge import RECIPE_FILE
from llamamoe.data.tokenize import tokenize
from llamamoe.errors import CheckpointError, LlamaMoeError, RefusedError, UsageError
from tests.hostile.conftest import digests
from tests.tokens import expected, make_model, make_model_with_bos, make_text, recipe, stream, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_every_document_and_its_end_in_order(model, tmp_path):
    texts = make_text(tmp_path / "text")
    found = tokenize(recipe(model, tmp_path / "text"), tmp_path / "out")
    for domain, documents in texts.items():
        ids = stream(tmp_path / "out", domain)
        assert ids == expected(model, documents)
        entry = found.index.splits["train"][domain]
        assert entry.documents == len(documents)
        assert entry.tokens == len(ids) == sum(len(text) + 1 for text in documents)
        assert entry.text_bytes == sum(map(len, documents))
        assert entry.largest_id == max(ids)
    index = found.index
    assert (index.dtype, index.eos_token_id, index.bos_token_id, index.vocab_size) == ("uint16", 2, None, 128)
    assert [(Path(s.file).name, s.bytes) for s in index.sources] == [
        (path.name, path.stat().st_size) for path in sorted((tmp_path / "text").rglob("*.jsonl"))
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b", "index.json", RECIPE_FILE]


def test_the_leading_token_only_where_the_tokenizer_puts_one_and_wide_ids(tmp_path):
    model = make_model_with_bos(tmp_path / "model")
    texts = ["w5 w69999 nothing", "w4"]
    write_rows(tmp_path / "text" / "words.jsonl", texts)
    index = tokenize(recipe(model, tmp_path / "text"), tmp_path / "out").index
    assert stream(tmp_path / "out", "words") == [1, 5, 69999, 0, 2, 1, 4, 2] == expected(model, texts)
    assert (index.dtype, index.bos_token_id, index.splits["train"]["words"].largest_id) == ("uint32", 1, 69999)


@pytest.mark.parametrize("size", [13, 64, 1000])
def test_shards_are_cut_to_length_and_lose_nothing(model, tmp_path, size, monkeypatch):
    monkeypatch.setattr(shard_writer, "BUFFER_TOKENS", 64)
    texts = make_text(tmp_path / "text")
    index = tokenize(recipe(model, tmp_path / "text", shard_tokens=size), tmp_path / "out").index
    for domain, documents in texts.items():
        assert stream(tmp_path / "out", domain) == expected(model, documents)
        shards = index.splits["train"][domain].shards
        assert all(shard.tokens <= size for shard in shards)
        for shard in shards:
            data = (tmp_path / "out" / shard.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (2 * shard.tokens, shard.sha256)


def test_the_number_of_processes_changes_no_byte(model, tmp_path):
    make_text(tmp_path / "text")
    keys = {"validation": {"documents": 3}, "shard_tokens": 300}
    for workers in (1, 3):
        tokenize(recipe(model, tmp_path / "text", workers=workers, **keys), tmp_path / f"out{workers}")
    assert digests(tmp_path / "out1") == digests(tmp_path / "out3")


def test_gathered_files_give_the_same_streams(model, tmp_path):
    texts = make_text(tmp_path / "text")
    found = tokenize(recipe(model, tmp_path / "text", gather_bytes=10**6), tmp_path / "out")
    assert found.units == 1
    for domain, documents in texts.items():
        assert stream(tmp_path / "out", domain) == expected(model, documents)


def test_named_domains_overrule_the_rows_and_rows_name_theirs(model, tmp_path):
    write_rows(tmp_path / "x" / "mixed.jsonl", ["one"], meta={"redpajama_set_name": "RedPajamaBook"})
    write_rows(tmp_path / "y" / "more.jsonl", ["two"], meta={"redpajama_set_name": "RedPajamaBook"})
    index = tokenize(recipe(model, tmp_path, domains={"mine": str(tmp_path / "y")}), tmp_path / "out").index
    assert {d: e.documents for d, e in index.splits["train"].items()} == {"book": 1, "mine": 1}
    assert stream(tmp_path / "out", "mine") == expected(model, ["two"])


def test_a_domains_name_is_never_a_path(model, tmp_path):
    write_rows(tmp_path / "text" / "f.jsonl", ["one"], meta={"redpajama_set_name": "../../etc/x .y"})
    index = tokenize(recipe(model, tmp_path / "text"), tmp_path / "out").index
    assert list(index.splits["train"]) == ["../../etc/x .y"]
    assert stream(tmp_path / "out", "../../etc/x .y") == expected(model, ["one"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text"]
    write_rows(tmp_path / "text" / "f.jsonl", ["one"], meta={"redpajama_set_name": "x" * 300})
    with pytest.raises(CheckpointError, match="cannot be the name of a domain"):
        tokenize(recipe(model, tmp_path / "text"), tmp_path / "out2")


def test_special_tokens_in_text_as_transformers_takes_them(model, tmp_path):
    write_rows(tmp_path / "text" / "f.jsonl", ["a<eos>b"])
    tokenize(recipe(model, tmp_path / "text"), tmp_path / "out")
    assert stream(tmp_path / "out", "f") == expected(model, ["a<eos>b"])
    assert stream(tmp_path / "out", "f").count(2) == 2


# ---- validation ----------------------------------------------------------------------------------------------------


def split_by_hash(texts: list[str], limit: int) -> tuple[list[str], list[str]]:
    held = [t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) < limit]
    return [t for t in texts if t not in held], held


def test_a_share_is_held_out_by_hash(model, tmp_path):
    texts = make_text(tmp_path / "text")
    tokenize(recipe(model, tmp_path / "text", validation={"share": 0.25}), tmp_path / "out")
    for domain, documents in texts.items():
        train, held = split_by_hash(documents, 2**62)
        assert held
        assert stream(tmp_path / "out", domain) == expected(model, train)
        assert stream(tmp_path / "out", domain, "validation") == expected(model, held)


def test_a_number_of_documents_is_held_out_and_equal_texts_stay_together(model, tmp_path):
    texts = make_text(tmp_path / "text")
    write_rows(tmp_path / "text" / "a" / "2.jsonl", texts["a"])  # everything twice
    tokenize(recipe(model, tmp_path / "text", validation={"documents": 4}), tmp_path / "out")
    documents = texts["a"] + texts["a"]
    limit = sorted(int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) for t in texts["a"])[3] + 1
    train, held = split_by_hash(documents, limit)
    assert len(held) == 8
    assert stream(tmp_path / "out", "a") == expected(model, train)
    assert stream(tmp_path / "out", "a", "validation") == expected(model, held)
    with pytest.raises(LlamaMoeError, match="'b' has only 17 different documents, so 18 cannot be held out"):
        tokenize(recipe(model, tmp_path / "text", validation={"documents": 18}), tmp_path / "out2")
    with pytest.raises(LlamaMoeError, match="All documents of b would be held out"):
        tokenize(recipe(model, tmp_path / "text", validation={"documents": 17}), tmp_path / "out3")


# ---- bad rows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_bad_rows(tmp_path) -> Path:
    folder = tmp_path / "text"
    write_rows(folder / "good.jsonl", ["good"])
    (folder / "odd.jsonl").write_bytes(
        b'{"text": "one"}\nnot json\n{"text": ""}\n{"no": 1}\n{"text": "\xff"}\n{"text": "two"}\n'
    )
    return folder


def test_bad_rows_are_left_out_counted_and_reported(model, with_bad_rows, tmp_path):
    found = tokenize(recipe(model, with_bad_rows), tmp_path / "out")
    assert stream(tmp_path / "out", "odd") == expected(model, ["one", "two"])
    bad = found.index.bad_rows
    assert (bad.total, bad.by_domain) == (4, {"odd": 4})
    assert [f"odd.jsonl:{n}: " in line for n, line in zip((2, 3, 4), bad.first, strict=True)] == [True] * 3
    assert "4 rows had no usable text" in found.warnings[0]
    assert "odd.jsonl:2: the line is not JSON" in found.warnings[0]


def test_strict_stops_at_the_first_also_when_it_finishes_a_tolerant_run(model, with_bad_rows, tmp_path):
    with pytest.raises(LlamaMoeError, match=r"odd\.jsonl:2: the line is not JSON"):
        tokenize(recipe(model, with_bad_rows), tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    (with_bad_rows / "zz.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n')[:-9])
    with pytest.raises(LlamaMoeError, match="cut short"):
        tokenize(recipe(model, with_bad_rows), tmp_path / "out", force=True)
    with pytest.raises(LlamaMoeError, match=r"odd\.jsonl:2: the line is not JSON"):
        tokenize(recipe(model, with_bad_rows), tmp_path / "out", strict=True, resume=True)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_text_that_is_not_there(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no text"):
        tokenize(recipe(model, tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(UsageError, match="the domain 'law' has no text: No file, folder or glob matches"):
        tokenize(recipe(model, domains={"law": [str(tmp_path / "none.jsonl")]}), tmp_path / "out")
    write_rows(tmp_path / "text" / "f.jsonl", ["x"])
    domains = {"p": str(tmp_path / "text"), "q": str(tmp_path / "text" / "f.jsonl")}
    with pytest.raises(UsageError, match="belongs to two domains: p and q"):
        tokenize(recipe(model, domains=domains), tmp_path / "out")
    (tmp_path / "blank.jsonl").write_text("\n{}\n")
    with pytest.raises(
        LlamaMoeError, match=r"The text contains no document. 1 rows held none, the first: .*blank\.jsonl:2"
    ):
        tokenize(recipe(model, tmp_path / "blank.jsonl"), tmp_path / "out")
    domains = {"law": str(tmp_path / "blank.jsonl")}
    with pytest.raises(
        LlamaMoeError, match="The domain 'law' is named in the recipe, but its files contain no document"
    ):
        tokenize(recipe(model, tmp_path / "text", domains=domains), tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_archive(model, tmp_path, workers):
    zstandard = pytest.importorskip("zstandard")
    make_text(tmp_path / "text")
    data = zstandard.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919 % 9973) for i in range(9000)))
    (tmp_path / "text" / "cut.jsonl.zst").write_bytes(data[: len(data) // 2])
    with pytest.raises(LlamaMoeError, match=r"cut\.jsonl\.zst' is cut short or damaged") as caught:
        tokenize(recipe(model, tmp_path / "text", workers=workers), tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_out_that_is_there(model, tmp_path):
    make_text(tmp_path / "text")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    for keys in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(RefusedError, match="not empty"):
            tokenize(recipe(model, tmp_path / "text"), out, **keys)
    assert digests(out).keys() == {"mine"}
    (out / "mine").unlink()
    tokenize(recipe(model, tmp_path / "text"), out)
    with pytest.raises(RefusedError, match="not empty"):
        tokenize(recipe(model, tmp_path / "text"), out)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RefusedError, match="not a folder"):
        tokenize(recipe(model, tmp_path / "text"), tmp_path / "file")


def test_a_folder_of_somebody_else_where_out_is_put_together(model, tmp_path):
    make_text(tmp_path / "text")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    for keys in ({"force": True}, {"resume": True}):
        with pytest.raises(RefusedError, match="holds something else"):
            tokenize(recipe(model, tmp_path / "text"), tmp_path / "out", **keys)
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"


def test_tokenizers_that_cannot_be_used(model, tmp_path):
    make_text(tmp_path / "text")
    with pytest.raises(CheckpointError, match="does not exist"):
        tokenize(recipe(tmp_path / "none", tmp_path / "text"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="'some/model' does not exist"):  # never asked of the hub
        tokenize(recipe(Path("some/model"), tmp_path / "text"), tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenize(recipe(bare, tmp_path / "text"), tmp_path / "out")
    endless = make_model(tmp_path / "endless")
    config = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        tokenize(recipe(endless, tmp_path / "text"), tmp_path / "out")


def test_a_full_disk_keeps_what_was_finished(model, tmp_path, monkeypatch):
    texts = make_text(tmp_path / "text")
    calls = []
    real = os.fsync

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(LlamaMoeError, match="No space left on device") as caught:
        tokenize(recipe(model, tmp_path / "text"), tmp_path / "out")
    assert "free some space and repeat the command with --resume" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    found = tokenize(recipe(model, tmp_path / "text"), tmp_path / "out", resume=True)
    assert found.kept >= 1
    assert stream(tmp_path / "out", "a") == expected(model, texts["a"])


def test_two_runs_in_one_folder(model, tmp_path):
    make_text(tmp_path / "text")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with (partial / ".ledger.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for keys in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(RefusedError, match="another process is writing"):
                tokenize(recipe(model, tmp_path / "text"), tmp_path / "out", **keys)
    tokenize(recipe(model, tmp_path / "text"), tmp_path / "out", resume=True)


def test_progress_ends_at_all_bytes(model, tmp_path):
    make_text(tmp_path / "text")
    steps = []
    tokenize(recipe(model, tmp_path / "text"), tmp_path / "out", progress=steps.append)
    assert [step.stage for step in steps] == ["tokenize"] * 3
    assert steps[-1].done == steps[-1].total == sum(p.stat().st_size for p in (tmp_path / "text").rglob("*.jsonl"))
