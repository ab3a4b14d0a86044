"""Tokens without a row in the embedding are told of by the plans, with both numbers and the key that names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamamoe import load_recipe, plan_conversion, plan_pretraining, split, tokenize
from llamamoe.checkpoint.tokenizer_ids import beyond_embedding
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.training.recipe import load_pretrain_recipe
from tests.dense import make_dense

RANDOM = {"method": "random", "num_experts": 4, "top_k": 2}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "dense")


def edit(path: Path, **keys: object) -> None:
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(data | keys), encoding="utf-8")


def add_token(folder: Path, content: str = "<new>", index: int = 128) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"].append({"id": index, "content": content, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def warnings(folder: Path) -> list[str]:
    return [each for each in plan_conversion(folder, load_recipe(given=RANDOM)).warnings if "embedding" in each]


def test_nothing_is_said_of_a_tokenizer_that_fits(dense: Path) -> None:
    assert warnings(dense) == []


def test_a_padding_token_that_only_the_tokenizer_has(dense: Path) -> None:
    add_token(dense)
    edit(dense / "tokenizer_config.json", pad_token="<new>")
    assert warnings(dense) == [
        "the tokenizer has 129 tokens, but the embedding has 128 rows: some ids have none",
        "special tokens have no row in the embedding, which has 128: pad_token (<new>) in tokenizer_config.json = 128",
    ]


def test_ids_of_special_tokens(dense: Path) -> None:
    edit(dense / "config.json", bos_token_id=1000, eos_token_id=[2, 1001])
    edit(dense / "generation_config.json", pad_token_id=128)
    [said] = warnings(dense)
    for wrong in (
        "bos_token_id in config.json = 1,000",
        "eos_token_id in config.json = 1,001",
        "generation_config.json = 128",
    ):
        assert wrong in said
    assert " = 2" not in said


@pytest.mark.parametrize("vocab", [[["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], {"<unk>": 0, "a": 1, "b": 2}])
def test_every_form_of_a_vocabulary(vocab: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    edit(tmp_path / "tokenizer_config.json", eos_token={"content": "b"})
    assert beyond_embedding(tmp_path, 3) == []
    first, second = beyond_embedding(tmp_path, 2)
    assert "3 tokens" in first
    assert "2 rows" in first
    assert "eos_token (b) in tokenizer_config.json = 2" in second


def test_of_the_model_that_is_trained(dense: Path, tmp_path: Path) -> None:
    add_token(dense)
    moe = split(dense, tmp_path / "moe", load_recipe(given=RANDOM), verify=False).out
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 50)
    given = {"tokenizer": str(moe), "text": [str(tmp_path / "text.txt")]}
    tokenize(load_tokenize_recipe(given=given), tmp_path / "tokens")
    recipe = load_pretrain_recipe(given={
        "model": str(moe), "data": {"train": str(tmp_path / "tokens"), "block_length": 32}, "steps": 2, "batch_size": 2,
        "micro_batch_size": 2,
    })  # fmt: skip
    assert plan_pretraining(recipe).warnings[0].startswith("the tokenizer has 129 tokens, but the embedding has 128")


def test_of_a_folder_in_the_place_of_a_gguf_files_tokenizer(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.cli.test_parents import make_gguf
    from tests.dense import make_byte_level

    source = make_dense(tmp_path / "source", vocab_size=300, intermediate_size=192)
    make_byte_level(source)
    path = make_gguf(source, tmp_path / "model.gguf", "F32")
    add_token(source, index=300)
    plan = plan_conversion(path, load_recipe(given=RANDOM), tokenizer=source)
    assert any("has 301 tokens, but the embedding has 300" in each for each in (*plan.warnings, *plan.advice))
