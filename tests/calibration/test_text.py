from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llamamoe.calibration import reading
from llamamoe.calibration.reading import Piece, Pool, document_cap
from llamamoe.calibration.soundness import odd_warnings, tokens_per_byte, unknown_share
from llamamoe.calibration.text import CalibrationText, calibration_text, document_hash, shared_documents, shares
from llamamoe.data.text import read_documents
from llamamoe.errors import CheckpointError, LlamaMoeError, UsageError
from tests.dense import make_tokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    """One token per ASCII character, 3 + its code - 32; <bos> 1 is not added, <eos> is 2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


class WithBos:
    """The same, but a beginning of sequence is put first."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
        out = self.inner(text, add_special_tokens=False, **options)
        if add_special_tokens:
            out["input_ids"] = [1, *out["input_ids"]]
        return out


def codes(text: str) -> list[int]:
    return [ord(c) - 29 for c in text]


def numbered(seed: int, length: int) -> str:
    """Text of ``length`` letters in which hardly two places are alike."""
    return "".join(chr(c) for c in np.random.default_rng(seed).integers(97, 123, length))


def write(folder: Path, **domains: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for domain, documents in domains.items():
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def take(
    folder: Path | list[str],
    tokenizer: Any,
    num_tokens: int = 1024,
    length: int = 32,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    vocab_size: int = 128,
) -> CalibrationText:
    patterns = folder if isinstance(folder, list) else [str(folder)]
    return calibration_text(
        patterns, tokenizer, num_tokens=num_tokens, length=length, weights=weights, seed=seed, vocab_size=vocab_size
    )


def stream(documents: list[list[int]], cap: int, tokens: int) -> list[int]:
    """The rule, plainly: capped documents with an end of sequence between them, cut off."""
    out: list[int] = []
    for index, document in enumerate(documents):
        out += [EOS] * (index > 0) + document[:cap]
    return out[:tokens]


def of(text: CalibrationText, domain: str) -> list[list[int]]:
    return sorted(row.tolist() for row, name in zip(text.ids_ST, text.domains_S, strict=True) if name == domain)


def rows(ids: list[int], length: int) -> list[list[int]]:
    return sorted(ids[i : i + length] for i in range(0, len(ids), length))


# ---- the mixture --------------------------------------------------------------------------------------------------


def test_each_domain_gives_its_stream_cut_into_sequences(tmp_path, tokenizer):
    a, b = [numbered(i, 90) for i in range(20)], [numbered(100 + i, 45) for i in range(40)]
    text = take(write(tmp_path / "t", a=a, b=b), tokenizer)
    assert text.ids_ST.shape == (32, 32)
    assert text.ids_ST.dtype == np.int64
    assert text.num_tokens == 1024
    assert of(text, "a") == rows(stream([codes(d) for d in a], 128, 512), 32)
    assert of(text, "b") == rows(stream([codes(d) for d in b], 128, 512), 32)
    assert text.clusters_S is None
    assert text.facts["documents"] == 6 + 12  # 512 tokens of 91 and of 46
    used = [*a[:6], *b[:12]]
    assert text.document_hashes == {hashlib.sha256(d.encode()).hexdigest()[:16] for d in used}


def test_every_document_begins_as_the_tokenizer_begins_a_text(tmp_path, tokenizer):
    documents = [numbered(i, 60) for i in range(20)]
    text = take(write(tmp_path / "t", a=documents), WithBos(tokenizer), num_tokens=512)
    assert of(text, "a") == rows(stream([[1, *codes(d)] for d in documents], 128, 512), 32)


def test_weights_share_the_sequences(tmp_path, tokenizer):
    folder = write(tmp_path / "t", **{name: [numbered(i, 3000)] for i, name in enumerate("abc")})
    text = take(folder, tokenizer, weights={"a": 3, "b": 1, "c": 0})
    assert [text.domains_S.count(name) for name in "abc"] == [24, 8, 0]
    assert {d: f["weight"] for d, f in text.facts["domains"].items()} == {"a": 0.75, "b": 0.25}
    assert [file["name"] for file in text.facts["files"]] == ["a.jsonl", "b.jsonl"]


def test_the_seed_changes_nothing_but_the_order(tmp_path, tokenizer):
    folder = write(tmp_path / "t", a=[numbered(0, 3000)], b=[numbered(1, 3000)])
    one, again, other = (take(folder, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.ids_ST, again.ids_ST)
    assert one.facts == again.facts
    assert not np.array_equal(one.ids_ST, other.ids_ST)
    assert of(one, "a") == of(other, "a")
    assert set(one.domains_S[:8]) == {"a", "b"}  # mixed from the start


def test_a_long_document_is_capped_while_there_are_others(tmp_path, tokenizer):
    documents = [numbered(i, 4000) for i in range(9)]
    text = take(write(tmp_path / "t", a=documents), tokenizer, num_tokens=2048)
    assert document_cap(2048, 32) == 256
    assert of(text, "a") == rows(stream([codes(d) for d in documents], 256, 2048), 32)
    assert text.facts["documents"] == 8


def test_too_few_documents_share_a_higher_cap(tmp_path, tokenizer):
    documents = [numbered(0, 4000), numbered(1, 50), numbered(2, 4000)]
    text = take(write(tmp_path / "t", a=documents), tokenizer)
    # 1024 = 50 + 2 ends + 2 * 486
    assert of(text, "a") == rows(stream([codes(d) for d in documents], 486, 1024), 32)
    assert text.warnings == ODD
    only = take(write(tmp_path / "u", a=[numbered(0, 5000)]), tokenizer)
    assert of(only, "a") == rows(codes(numbered(0, 5000))[:1024], 32)


ODD = (
    "The tokenizer has hardly any word of this calibration text in its vocabulary (tokens per byte: a 1.00; English: 0.2 to 0.3). "
    "Check that it is text in a language that the model was trained on, and that the tokenizer is the model's own.",
)
"""The tests' tokenizer has a token for each character, which the text is rightly said to be odd for."""


@settings(max_examples=40)
@given(
    sizes=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=8), min_size=1, max_size=4),
    num_tokens=st.integers(340, 700),
    length=st.integers(2, 80),
)
def test_no_token_is_lost_or_out_of_order(tmp_path_factory, tokenizer, sizes, num_tokens, length):
    documents = {f"d{i}": [numbered(10 * i + j, n) for j, n in enumerate(each)] for i, each in enumerate(sizes)}
    folder = write(tmp_path_factory.mktemp("text"), **documents)
    total = sum(sum(each) + len(each) - 1 for each in sizes)
    if total < 256:
        with pytest.raises(UsageError, match=f"only {total} tokens"):
            take(folder, tokenizer, num_tokens, length)
        return
    text = take(folder, tokenizer, num_tokens, length)
    count, used = text.ids_ST.shape
    assert used <= length
    assert count <= num_tokens // used
    for domain, each in documents.items():
        here = text.domains_S.count(domain)
        whole = stream([codes(d) for d in each], 1000, 10**6)
        assert here <= len(whole) // used
        # Under some cap, which is at least the stated one, the rows are the domain's stream.
        caps = range(document_cap(here * used, used), 1001)
        assert any(of(text, domain) == rows(stream([codes(d) for d in each], cap, here * used), used) for cap in caps)
    if count < num_tokens // used:  # then nothing was left lying about
        assert all(
            text.domains_S.count(d) == len(stream([codes(x) for x in each], 1000, 10**6)) // used
            for d, each in documents.items()
        )
        assert any("provides only" in warning for warning in text.warnings)


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    count=st.integers(0, 500),
    limits=st.dictionaries(st.integers(0, 5), st.integers(0, 100)),
)
def test_shares_sum_to_the_whole_and_keep_within_limits(weights, count, limits):
    names = {str(i): w for i, w in enumerate(weights)}
    caps = {str(i): c for i, c in limits.items() if i < len(weights)}
    out = shares(names, count, caps)
    room = sum(caps.values()) if len(caps) == len(names) else count
    assert sum(out.values()) == min(count, room)
    assert all(out[name] <= caps.get(name, count) for name in names)
    if not caps:
        exact = [count * w / sum(weights) for w in weights]
        assert all(abs(out[str(i)] - e) < 1 + 1e-9 for i, e in enumerate(exact))


# ---- too little ---------------------------------------------------------------------------------------------------


def test_a_small_domain_gives_what_it_has_and_others_fill_up(tmp_path, tokenizer):
    folder = write(tmp_path / "t", a=[numbered(0, 70)], b=[numbered(1, 4000)], c=[numbered(2, 4000)])
    text = take(folder, tokenizer, num_tokens=960)
    assert [text.domains_S.count(name) for name in "abc"] == [2, 14, 14]
    assert (
        "The domain 'a' has only 70 tokens of calibration text: it contributes 2 instead of 10 sequences, and the other "
        "domains contribute more if they can." in text.warnings
    )


def test_little_text_in_all_is_said_with_its_number(tmp_path, tokenizer):
    text = take(write(tmp_path / "t", a=[numbered(0, 500)]), tokenizer)
    assert text.ids_ST.shape == (15, 32)
    assert "The calibration text provides only 480 of the 1024 tokens asked for." in text.warnings


@pytest.mark.parametrize("size", [0, 1, 255])
def test_too_little_text_is_refused(tmp_path, tokenizer, size):
    folder = write(tmp_path / "t", a=[numbered(0, size)] if size else [])
    with pytest.raises(UsageError, match=f"calibration text has only {size} tokens; at least 256 are needed"):
        take(folder, tokenizer)


def test_sequences_are_shortened_to_what_the_domains_have(tmp_path, tokenizer):
    text = take(write(tmp_path / "t", a=[numbered(0, 200)], b=[numbered(1, 190)]), tokenizer, length=512)
    assert text.ids_ST.shape == (2, 190)
    assert any("have 190 tokens instead of 512" in warning for warning in text.warnings)


def test_sequences_are_shortened_so_that_every_domain_has_one(tmp_path, tokenizer):
    folder = write(tmp_path / "t", **{name: [numbered(i, 3000)] for i, name in enumerate("abcde")})
    text = take(folder, tokenizer, length=512)
    assert text.ids_ST.shape == (5, 204)
    assert sorted(text.domains_S) == list("abcde")
    few = take(folder, tokenizer, length=512, num_tokens=300)  # but not below 128
    assert few.ids_ST.shape == (2, 128)
    assert "No calibration text is taken from c, d, e: its share is less than one sequence." in few.warnings


# ---- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0}, r"weight of the domain 'a' is -1\.0"),
        ({"a": float("nan")}, "weight of the domain 'a' is nan"),
        ({"a": float("inf")}, "weight of the domain 'a' is inf"),
        ({"a": 0.0}, "All domain weights are zero"),
        ({}, "All domain weights are zero"),
        ({"a": 1, "wiki": 1}, "Weights name 'wiki', but the text has the domains a, b"),
    ],
)
def test_unusable_weights_are_refused(tmp_path, tokenizer, weights, message):
    folder = write(tmp_path / "t", a=[numbered(0, 3000)], b=[numbered(1, 3000)])
    with pytest.raises(UsageError, match=message):
        take(folder, tokenizer, weights=weights)


def test_unusable_numbers_are_refused(tmp_path, tokenizer):
    folder = write(tmp_path / "t", a=[numbered(0, 3000)])
    with pytest.raises(UsageError, match="num_tokens is 255"):
        take(folder, tokenizer, num_tokens=255)
    with pytest.raises(UsageError, match="sequences is 1"):
        take(folder, tokenizer, length=1)
    with pytest.raises(UsageError, match="No file, folder or glob"):
        take(["nowhere/*.txt"], tokenizer)
    with pytest.raises(CheckpointError, match="produces the id 93, but the model has only 90 embeddings"):
        take(folder, tokenizer, vocab_size=90)


def test_text_that_is_not_utf8_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9" * 200)
    with pytest.raises(LlamaMoeError, match="byte 4 is not UTF-8"):
        take([str(tmp_path / "a.txt")], tokenizer)


# ---- reading no more than needed ----------------------------------------------------------------------------------


def test_reading_stops_when_there_is_enough(tmp_path, tokenizer, monkeypatch):
    folder = write(
        tmp_path / "t", a=[numbered(i, 300) for i in range(500)], b=[numbered(i, 300) for i in range(900, 999)]
    )
    read: list[str] = []

    def watched(patterns: Any) -> Any:
        for document in read_documents(patterns):
            read.append(document.origin)
            yield document

    monkeypatch.setattr(reading, "read_documents", watched)
    monkeypatch.setattr(reading, "LOOK_ROWS", 3)
    text = take(folder, tokenizer)
    # 3 rows of each file to see its domains, then 512 tokens at 128 of each document
    assert [origin.split("/")[-1] for origin in read] == [
        *(f"{name}.jsonl:{i}" for name in "ab" for i in (1, 2, 3)),
        *(f"{name}.jsonl:{i}" for name in "ab" for i in (1, 2, 3, 4)),
    ]
    assert text.facts["documents"] == 8


def test_txt_files_of_a_folder_are_its_domain_and_read_as_needed(tmp_path, tokenizer):
    folder = tmp_path / "stories"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(numbered(i, 200))
    (folder / "9.txt").write_bytes(b"\xff")  # never read
    text = take(folder, tokenizer)
    assert set(text.domains_S) == {"stories"}
    assert text.facts["documents"] == 8


def test_a_file_is_taken_up_again_when_another_domain_lacks_text(tmp_path, tokenizer):
    documents = [numbered(i, 100) for i in range(30)]
    text = take(write(tmp_path / "t", a=documents, b=[numbered(99, 40)]), tokenizer)
    assert [text.domains_S.count(name) for name in "ab"] == [31, 1]
    assert of(text, "a") == rows(stream([codes(d) for d in documents], 128, 31 * 32), 32)


def test_mixed_files_keep_their_rows_domains(tmp_path, tokenizer):
    lines = [
        {"text": numbered(i, 100), "meta": {"redpajama_set_name": ["RedPajamaC4", "RedPajamaBook"][i % 2]}}
        for i in range(60)
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = take([str(path)], tokenizer)
    assert of(text, "book") == rows(stream([codes(line["text"]) for line in lines[1::2]], 128, 512), 32)
    assert sorted(set(text.domains_S)) == ["book", "c4"]


def test_of_a_huge_document_only_the_beginning_is_tokenised(tmp_path, tokenizer):
    seen: list[int] = []

    class Watched(WithBos):
        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return self.inner(text, **options)

    huge = numbered(0, 400_000)
    text = take(write(tmp_path / "t", a=[huge]), Watched(tokenizer), num_tokens=256)
    assert max(seen) == 256 * 16
    assert text.document_hashes == {document_hash(huge)}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 120))
def test_a_pool_raises_its_cap_no_further_than_needed(sizes, cap, tokens):
    pool = Pool()
    for i, size in enumerate(sizes):
        pool.add(Piece(np.full(size, 10 + i, np.int32), np.arange(size), str(i), Path()))
    documents = [[10 + i] * size for i, size in enumerate(sizes)]
    ids, used = pool.take(tokens, cap, EOS)
    lowest = next((c for c in range(cap, 1000) if len(stream(documents, c, 10**6)) >= tokens), cap)
    want = stream(documents, lowest, tokens)
    assert ids.tolist() == want
    assert [(int(piece.digest), count) for piece, count in used] == [
        (i, want.count(10 + i)) for i in range(len(sizes)) if want.count(10 + i)
    ]


# ---- odd text -----------------------------------------------------------------------------------------------------


def test_tokens_per_byte_leaves_the_leading_token_out():
    piece = Piece(np.zeros(5, np.int32), np.array([0, 4, 8, 12, 16]), "", Path())
    assert tokens_per_byte([(piece, 5)], bos=1) == 4 / 16
    assert tokens_per_byte([(piece, 3)], bos=1) == 2 / 8
    assert tokens_per_byte([(piece, 1)], bos=1) is None


def test_unknown_characters_are_counted():
    class Fallback:
        unk_token_id, eos_token_id = 0, 2

        def get_vocab(self) -> dict[str, int]:
            return {"<unk>": 0, "</s>": 2, "<0x0A>": 5, "<0xC3>": 6, "a": 7}

    assert unknown_share(Fallback(), np.array([7, 7, 0, 5, 6, 2, 7, 7])) == 2 / 8
    Fallback.unk_token_id = 2  # some families name one token for all
    assert unknown_share(Fallback(), np.array([7, 2, 2, 6])) == 1 / 4


def test_odd_text_is_named_with_its_number():
    assert odd_warnings({"a": 0.69, "b": None}, {"a": 0.05, "b": 0.0}) == []
    per_byte, unknown = odd_warnings({"a": 0.25, "b": 0.93}, {"a": 0.4, "b": 0.0})
    assert "tokens per byte: b 0.93;" in per_byte
    assert "unknown tokens: a 40%" in unknown


# ---- overlap ------------------------------------------------------------------------------------------------------


def test_documents_used_for_calibration_are_found_again(tmp_path, tokenizer):
    documents = [numbered(i, 300) for i in range(30)]
    text = take(write(tmp_path / "t", a=documents), tokenizer)
    held_out = write(tmp_path / "v", x=[documents[20], documents[1], documents[0] + " "], y=[documents[7]])
    found = shared_documents(text.document_hashes, read_documents([held_out]))
    # document 20 was not reached (8 documents give 128 tokens each), the third differs by a blank
    assert found == (f"{held_out / 'x.jsonl'}:2", f"{held_out / 'y.jsonl'}:1")
