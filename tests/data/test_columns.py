"""Documents under another name, and in folders that the package datasets saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamamoe.data.text import read_documents
from llamamoe.data.tokenize import tokenize
from llamamoe.errors import LlamaMoeError
from tests.tokens import make_model, recipe, stream, write_rows

TEXTS = ["abc", "de fg", "a" * 40, "xyz"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def save_to_disk(folder: Path, column: str, texts: list[str]) -> Path:
    """Let the package datasets write a folder with two files of rows."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"id": list(range(len(texts))), column: texts})
    rows.save_to_disk(folder, num_shards=2)
    return folder


def test_a_saved_dataset_gives_the_tokens_of_the_same_lines(model, tmp_path):
    write_rows(tmp_path / "lines" / "tales.jsonl", TEXTS)
    tokenize(recipe(model, tmp_path / "lines"), tmp_path / "a")
    tokenize(recipe(model, save_to_disk(tmp_path / "tales" / "train", "text", TEXTS)), tmp_path / "b")
    assert stream(tmp_path / "a", "tales") == stream(tmp_path / "b", "tales")


def test_results_that_were_cached_beside_a_saved_dataset_are_not_read_again(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = save_to_disk(tmp_path / "tales" / "train", "text", TEXTS)
    saved = datasets.load_from_disk(folder)
    saved.map(lambda row: {"text": row["text"].upper()}, new_fingerprint="0" * 16)
    assert list(folder.glob("cache-*.arrow"))
    assert [document.text for document in read_documents([folder])] == TEXTS


def test_the_splits_of_a_dataset_are_not_read_as_one_text(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": TEXTS}) for name in ("test", "train")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "tales")
    with pytest.raises(LlamaMoeError, match=r"several splits of a dataset \(test, train\)[\s\S]*tales/train"):
        list(read_documents([tmp_path / "tales"]))
    assert [document.text for document in read_documents([tmp_path / "tales" / "train"])] == TEXTS
    datasets.DatasetDict(only=parts["test"]).save_to_disk(tmp_path / "one")
    assert [document.text for document in read_documents([tmp_path / "one"])] == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "arrow", "parquet"])
def test_the_column_that_the_recipe_names_is_read(kind, model, tmp_path):
    rows = [{"text": "wrong", "content": text} for text in TEXTS]
    path = tmp_path / "text" / f"tales.{kind}"
    if kind == "jsonl":
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "arrow":
        save_to_disk(path.parent / "tales", "content", TEXTS)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path.parent.mkdir()
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    write_rows(tmp_path / "lines" / "tales.jsonl", TEXTS)
    tokenize(recipe(model, tmp_path / "lines"), tmp_path / "a")
    found = recipe(model, tmp_path / "text").model_copy(update={"text_column": "content"})
    tokenize(found, tmp_path / "b")
    assert stream(tmp_path / "a", "tales") == stream(tmp_path / "b", "tales")


def test_a_column_that_is_missing_or_a_file_that_is_cut_is_named(tmp_path):
    folder = save_to_disk(tmp_path / "tales", "content", TEXTS)
    with pytest.raises(LlamaMoeError, match=r"arrow' has no column 'text'; it has id, content\.[\s\S]*text_column"):
        list(read_documents([folder]))
    good = save_to_disk(tmp_path / "good", "text", TEXTS)
    first = sorted(good.glob("*.arrow"))[0]
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    with pytest.raises(LlamaMoeError, match="is not a valid Arrow file"):
        list(read_documents([good]))
