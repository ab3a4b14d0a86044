"""Indexed datasets for Megatron: read by numpy alone as its reader does, and by its reader itself where it is installed."""

from __future__ import annotations

import json
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from llamamoe import CheckpointError, RefusedError, UsageError, export_tokens, tokenize
from llamamoe.checkpoint.ledger import Ledger
from llamamoe.data import export_tokens as module
from llamamoe.progress import RESUMED, Progress
from tests.tokens import make_model, make_model_with_bos, make_text, recipe, stream, write_rows

NUMPY = {4: np.int32, 8: np.uint16}
"""Codes of Megatron's dtypes."""


def documents(prefix: Path) -> list[list[int]]:
    """The documents of a dataset, by the layout of ``_IndexReader`` in Megatron's indexed_dataset.py."""
    raw = prefix.with_name(prefix.name + ".idx").read_bytes()
    magic, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    pointers = np.frombuffer(raw, np.int64, sequences, 34 + 4 * sequences)
    document_ends = np.frombuffer(raw, np.int64, ends, 34 + 12 * sequences)
    assert len(raw) == 34 + 12 * sequences + 8 * ends
    assert document_ends.tolist() == list(range(sequences + 1))
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    return [
        np.frombuffer(data, NUMPY[code], n, at).tolist()
        for n, at in zip(lengths.tolist(), pointers.tolist(), strict=True)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokens(model: Path, tmp_path: Path) -> Path:
    make_text(tmp_path / "text")
    settings = recipe(model, tmp_path / "text", shard_tokens=1000, validation={"documents": 8})
    tokenize(settings, tmp_path / "tokens")
    return tmp_path / "tokens"


def test_every_document_of_every_domain_and_split(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 7)  # documents and shards are cut anywhere
    found = export_tokens(tokens, tmp_path / "out")
    index = json.loads((tokens / "index.json").read_text())
    assert {(each.split, each.domain) for each in found.domains} == {
        (split, domain) for split, entries in index["splits"].items() for domain in entries
    }
    assert len(index["splits"]["train"]["a"]["shards"]) > 1
    for each in found.domains:
        read = documents(tmp_path / "out" / each.prefix)
        assert list(chain.from_iterable(read)) == stream(tokens, each.domain, each.split)
        assert all(ids[-1] == index["eos_token_id"] and index["eos_token_id"] not in ids[:-1] for ids in read)
        assert len(read) == each.documents == index["splits"][each.split][each.domain]["documents"]
    assert not found.warnings
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train", "validation"]


def test_ids_of_more_than_16_bits(tmp_path: Path) -> None:
    model = make_model_with_bos(tmp_path / "model")
    write_rows(tmp_path / "text" / "a.jsonl", ["w3 w69999", "w65536"])
    tokenize(recipe(model, tmp_path / "text"), tmp_path / "tokens")
    found = export_tokens(tmp_path / "tokens", tmp_path / "out")
    assert found.dtype == "int32"
    assert documents(tmp_path / "out" / "train" / "a") == [[1, 3, 69999, 2], [1, 65536, 2]]
    assert found.data_path("train") == ["7", str(tmp_path / "out" / "train" / "a")]


def test_megatrons_own_reader(tokens: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for each in export_tokens(tokens, tmp_path / "out").domains:
        prefix = tmp_path / "out" / each.prefix
        dataset = reader.IndexedDataset(str(prefix))
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents(prefix)


def test_an_end_inside_of_a_document_is_told(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "text" / "a.jsonl", ["abc", "de"])
    tokenize(recipe(model, tmp_path / "text"), tmp_path / "tokens")
    shard, index = tmp_path / "tokens" / "a" / "00000.bin", tmp_path / "tokens" / "index.json"
    ids = np.frombuffer(shard.read_bytes(), "<u2").copy()
    ids[1] = 2
    old = json.loads(index.read_text())
    shard.write_bytes(ids.tobytes())
    old["splits"]["train"]["a"]["shards"][0]["sha256"] = module.hashlib.sha256(ids.tobytes()).hexdigest()
    index.write_text(json.dumps(old))
    found = export_tokens(tmp_path / "tokens", tmp_path / "out")
    assert found.warnings == (
        "train/a has 2 documents and 3 end-of-sequence tokens: Megatron sees a document end at each of them.",
    )
    assert [len(ids) for ids in documents(tmp_path / "out" / "train" / "a")] == [2, 2, 3]


def test_a_damaged_shard_leaves_no_out_and_resume_keeps_what_is_whole(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tokens / "b" / "00000.bin"
    right = shard.read_bytes()
    shard.write_bytes(right[:-2] + b"\x05\x00")
    with pytest.raises(CheckpointError, match=r"b/00000\.bin' was changed since the text was tokenised"):
        export_tokens(tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("b.*"))
    shard.write_bytes(right)
    with pytest.raises(RefusedError, match="left from a run that was stopped"):
        export_tokens(tokens, tmp_path / "out")
    written: list[str] = []
    append = Ledger.append
    monkeypatch.setattr(Ledger, "append", lambda self, line: (written.append(line["unit"]), append(self, line)))
    steps: list[Progress] = []
    found = export_tokens(tokens, tmp_path / "out", resume=True, progress=steps.append)
    (kept,) = [step for step in steps if step.stage == RESUMED]
    assert 0 < kept.done < kept.total == len(found.domains)
    assert "train/a" not in written
    assert "train/b" in written
    for each in found.domains:
        assert list(chain.from_iterable(documents(tmp_path / "out" / each.prefix))) == stream(
            tokens, each.domain, each.split
        )


def test_what_cannot_be_exported_is_refused_before_a_byte(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'megatorn' is unknown"):
        export_tokens(tokens, tmp_path / "out", format="megatorn")
    with pytest.raises(CheckpointError, match="is not a folder of tokens"):
        export_tokens(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(RefusedError, match="must not contain each other"):
        export_tokens(tokens, tokens / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(RefusedError, match="exists and is not empty"):
        export_tokens(tokens, tmp_path / "full")
    assert not list(tmp_path.glob("*.partial"))


def test_ids_that_megatron_cannot_hold(tokens: Path, tmp_path: Path) -> None:
    index = json.loads((tokens / "index.json").read_text())
    index["vocab_size"] = 2**31 + 1
    index["splits"]["train"]["a"]["largest_id"] = 2**31
    (tokens / "index.json").write_text(json.dumps(index))
    with pytest.raises(RefusedError, match=r"the largest token id is 2,147,483,648, but Megatron reads ids as int32"):
        export_tokens(tokens, tmp_path / "out")


def test_a_disk_that_is_too_small(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda out, resume: 100)
    with pytest.raises(RefusedError, match=r"the export takes [0-9,]+ bytes, and the disk of .* has 100 free"):
        export_tokens(tokens, tmp_path / "out")
