"""Reading tokens back: blocks across shards, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from llamamoe.data import shards
from llamamoe.data.shards import TokenCorpus
from llamamoe.data.tokenize import tokenize
from llamamoe.errors import CheckpointError, RefusedError, UsageError
from tests.tokens import configure, make_model, make_model_with_bos, make_text, recipe, stream


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokens(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    make_text(folder / "text")
    given = {"shard_tokens": 50, "validation": {"share": 0.3}}
    tokenize(recipe(model, folder / "text", **given), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(tokens, tmp_path) -> Path:
    return Path(shutil.copytree(tokens, tmp_path / "copy"))


def edit_index(folder: Path, **keys: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | keys))


@pytest.mark.parametrize("length", [1, 7, 50, 64, 130])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_blocks_are_the_stream_cut_into_pieces(tokens, length, split):
    corpus = TokenCorpus(tokens, split)
    assert corpus.domains == ("a", "b")
    for domain in corpus.domains:
        ids = np.array(stream(tokens, domain, split))
        count = corpus.num_blocks(domain, length)
        assert (corpus.tokens(domain), count) == (len(ids), len(ids) // length)
        whole = ids[: count * length].reshape(count, length)
        order = np.random.default_rng(0).permutation(count)
        blocks = corpus.blocks(domain, order, length)
        assert blocks.dtype == np.int64
        assert np.array_equal(blocks, whole[order])
        for i in range(count):
            assert np.array_equal(corpus.block(domain, i, length), whole[i])


def test_blocks_of_several_domains_keep_their_order(tokens):
    corpus = TokenCorpus(tokens)
    domains, blocks = np.array([1, 0, 0, 1, 0]), np.array([0, 5, 0, 2, 5])
    got = corpus.gather(domains, blocks, 20)
    for row, domain, block in zip(got, domains, blocks, strict=True):
        assert np.array_equal(row, corpus.block(corpus.domains[domain], block, 20))
    assert corpus.gather(np.empty(0, int), np.empty(0, int), 20).shape == (0, 20)


def test_few_files_are_open_at_a_time(tokens, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    corpus = TokenCorpus(tokens)
    count = corpus.num_blocks("a", 30)
    assert np.array_equal(corpus.blocks("a", np.arange(count), 30).ravel(), stream(tokens, "a")[: 30 * count])
    assert len(corpus._maps) == 2


def test_a_pickled_corpus_carries_no_tokens(tokens):
    corpus = TokenCorpus(tokens)
    corpus.block("a", 0, 10)
    data = pickle.dumps(corpus)
    other = pickle.loads(data)
    assert not other._maps
    assert np.array_equal(other.block("a", 3, 10), corpus.block("a", 3, 10))


def test_a_split_by_its_path(tokens):
    by_path = TokenCorpus(tokens / "validation")
    assert (by_path.split, by_path.folder) == ("validation", tokens)
    assert by_path.fingerprint == TokenCorpus(tokens, "validation").fingerprint != TokenCorpus(tokens).fingerprint
    with pytest.raises(UsageError, match="no split 'test'"):
        TokenCorpus(tokens, "test")


def test_misuse(tokens):
    corpus = TokenCorpus(tokens)
    with pytest.raises(UsageError, match="no domain 'c'"):
        corpus.num_blocks("c", 10)
    with pytest.raises(UsageError, match="at least 1"):
        corpus.num_blocks("a", 0)
    last = corpus.num_blocks("a", 10)
    for index in (last, -1):
        with pytest.raises(IndexError, match=f"has {last} blocks"):
            corpus.block("a", index, 10)


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), r"a/00001\.bin' is cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"a/00001\.bin' is too long"),
        (lambda path: path.unlink(), r"a/00001\.bin' cannot be read: No such file"),
    ],
)
def test_a_shard_of_another_size_is_seen_at_once(copy, change, message):
    change(copy / "a" / "00001.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        TokenCorpus(copy)
    assert caught.value.hint


def test_an_index_without_domains_is_refused(copy):
    path = copy / "index.json"
    index = json.loads(path.read_text())
    index["splits"]["train"] = {}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no domain in its split 'train'"):
        TokenCorpus(copy)


def test_a_changed_shard_is_found_by_its_hash(copy):
    TokenCorpus(copy).verify()
    TokenCorpus(copy, "validation").verify()
    path = copy / "b" / "00002.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    steps = []
    with pytest.raises(CheckpointError, match=r"b/00002\.bin' was changed since the text was tokenised"):
        TokenCorpus(copy).verify(steps.append)
    assert steps, "those before it were sound"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format": "other"}', "is not the index"),
        ('{"format": "llamamoe tokens", "version": 2}', "format version 2, and this llamamoe reads version 1"),
        ('{"format": "llamamoe tokens", "version": 1}', "is damaged: tokenizer: Field required"),
    ],
)
def test_an_index_that_is_none(copy, text, message):
    (copy / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        TokenCorpus(copy)


def test_no_folder_of_tokens(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no index\.json"):
        TokenCorpus(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no index\.json"):
        TokenCorpus(tmp_path / "none" / "validation")


@pytest.mark.parametrize("file", ["../x/00000.bin", "a/0\0.bin", "/etc/passwd", "a/b/c.bin", "..\\x/0.bin"])
def test_the_index_cannot_name_files_elsewhere(copy, file):
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["train"]["a"]["shards"][0]["file"] = file
    edit_index(copy, splits=index["splits"])
    with pytest.raises(CheckpointError, match="which is not a file in it: refused"):
        TokenCorpus(copy)


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_the_right_tokenizer_also_when_saved_again(tokens, model, tmp_path):
    from transformers import AutoTokenizer

    corpus = TokenCorpus(tokens)
    corpus.check_tokenizer(model)
    again = AutoTokenizer.from_pretrained(model)
    again(["used", "with padding"], padding=True, truncation=True, max_length=3)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() != (model / "tokenizer.json").read_bytes()
    corpus.check_tokenizer(configure(tmp_path / "again", 128))


def test_other_tokenizers_and_vocabularies_are_refused(tokens, model, tmp_path):
    corpus = TokenCorpus(tokens)
    with pytest.raises(RefusedError, match="has a different one"):
        corpus.check_tokenizer(make_model(tmp_path / "smaller", 127))
    with pytest.raises(RefusedError, match="has a different one"):
        corpus.check_tokenizer(make_model_with_bos(tmp_path / "words", 128))
    small = configure(Path(shutil.copytree(model, tmp_path / "small")), 90)
    with pytest.raises(RefusedError, match=r"holds the token 93, but .* has a vocabulary of 90"):
        corpus.check_tokenizer(small)
    other_end = Path(shutil.copytree(model, tmp_path / "end"))
    config = json.loads((other_end / "tokenizer_config.json").read_text())
    (other_end / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    with pytest.raises(RefusedError, match=r"end-of-sequence token of .* is 0, but 2"):
        corpus.check_tokenizer(other_end)
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match="is not a model"):
        corpus.check_tokenizer(tmp_path / "bare")


def rewrite_shard(folder: Path, place: int, token: int, *, honest: bool) -> Path:
    """Put an id into a shard; honest: with its new hash in the index."""
    index = json.loads((folder / "index.json").read_text())
    entry = index["splits"]["train"]["a"]["shards"][1]
    path = folder / entry["file"]
    ids = np.fromfile(path, dtype=index["dtype"])
    ids[place] = token
    ids.tofile(path)
    if honest:
        entry["sha256"] = shards.file_sha256(path)
        edit_index(folder, splits=index["splits"])
    return path


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("length", [7, 64])
def test_an_id_beyond_the_vocabulary_is_named(copy: Path, length: int, honest: bool) -> None:
    path = rewrite_shard(copy, 3, 60_000, honest=honest)
    corpus = TokenCorpus(copy)
    with pytest.raises(CheckpointError, match="60000 at token 3,") as caught:
        corpus.blocks("a", np.arange(corpus.num_blocks("a", length)), length)
    assert str(path) in str(caught.value)
    assert "vocabulary of 128" in str(caught.value)


def test_an_index_with_an_id_beyond_its_vocabulary_is_damaged(copy: Path) -> None:
    edit_index(copy, vocab_size=40)
    with pytest.raises(CheckpointError, match=r"holds the id [0-9]+, but the vocabulary has 40"):
        TokenCorpus(copy)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(copy: Path, whole_folder: bool) -> None:
    inner = copy / "a" if whole_folder else copy / "a" / "00001.bin"
    inner.rename(copy.parent / "elsewhere")
    inner.symlink_to(copy.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link out of the folder"):
        TokenCorpus(copy)


def test_a_shard_that_is_a_pipe_is_refused(copy: Path) -> None:
    (copy / "a" / "00001.bin").unlink()
    os.mkfifo(copy / "a" / "00001.bin")
    with pytest.raises(UsageError, match="is a pipe"):
        TokenCorpus(copy)


def test_a_linked_folder_of_tokens_may_be_named(copy: Path) -> None:
    (copy.parent / "link").symlink_to(copy)
    assert TokenCorpus(copy.parent / "link").domains == ("a", "b")
