"""Written tokenizers tokenise as the parent's does, in the program that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import llamamoe
from llamamoe.checkpoint.tokenizer_difference import PROBES, difference
from tests.dense import make_dense
from tests.paths import SHARED_DATA

STORIES = SHARED_DATA / "models" / "stories260k"
FUZZ = SHARED_DATA.parent / "cases" / "fuzz"
TARGETS = ("mixtral", "qwen2_moe", "granitemoeshared", "glm4_moe", "ernie4_5_moe")
needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason="the tiny Llama with a SentencePiece vocabulary is not there"
)
needs_cases = pytest.mark.skipif(not FUZZ.is_dir(), reason="the collected cases are not there")


def convert(source: Path, out: Path, **given: Any) -> Path:
    recipe = llamamoe.load_recipe(given={"method": "random", "num_experts": 4, "top_k": 2} | given)
    return llamamoe.split(source, out, recipe, verify=False).out


def opened(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ids(folder: Path) -> list[list[int]]:
    tokenizer = opened(folder)
    return [list(tokenizer(text, add_special_tokens=flag).input_ids) for text in PROBES for flag in (True, False)]


def no_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def literal_llama(folder: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
              "tokenizer_class": "LlamaTokenizer", "legacy": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def as_it_is(folder: Path) -> None:
    """Change nothing."""


@needs_stories
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("change", [as_it_is, no_config, literal_llama])
def test_ids_are_the_parents_for_every_target(change: Callable[[Path], None], target: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(STORIES, tmp_path / "source", ignore=shutil.ignore_patterns("*.md")))
    for path in source.iterdir():
        path.chmod(0o644)
    change(source)
    out = convert(source, tmp_path / "out", target=target)
    assert ids(out) == ids(source)
    assert difference(opened(source), opened(out)) is None


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "dense", num_hidden_layers=1)


def test_files_of_the_slow_form_are_carried_over(dense: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(PROBES, trainer)
    tokenizer.model.save(str(dense))
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    out = convert(dense, tmp_path / "out")
    assert len(ids(dense)[6]) > 3, "the probe is made of tokens that are known"
    assert ids(out) == ids(dense)


def test_further_chat_templates_are_carried_over(dense: Path, tmp_path: Path) -> None:
    (dense / "chat_template.jinja").write_text("plain {{ messages[0].content }}")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool.jinja").write_text("tool {{ messages[0].content }}")
    out = opened(convert(dense, tmp_path / "out"))
    talk = [{"role": "user", "content": "hi"}]
    assert out.apply_chat_template(talk, tokenize=False) == "plain hi"
    assert out.apply_chat_template(talk, tokenize=False, chat_template="tool") == "tool hi"


def test_a_source_without_a_tokenizer_is_told_in_the_plan(dense: Path) -> None:
    (dense / "tokenizer.json").rename(dense / "tekken.json")
    plan = llamamoe.plan_conversion(dense, llamamoe.load_recipe(given={"method": "random"}))
    assert any("no tokenizer" in each and "tekken.json" in each for each in (*plan.warnings, *plan.advice))


def test_a_pointer_of_git_lfs_is_called_one(dense: Path) -> None:
    (dense / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(llamamoe.LlamaMoeError, match="Git LFS pointer") as caught:
        llamamoe.plan_conversion(dense)
    assert "git lfs pull" in str(caught.value)


@needs_cases
@pytest.mark.parametrize("case", ["tok-15-0-tokenizer.json", "tok-15-9-tokenizer.json", "gen-14-16.json"])
def test_broken_files_are_refused_in_the_plan(case: str, dense: Path, tmp_path: Path) -> None:
    name = "tokenizer.json" if case.startswith("tok") else "generation_config.json"
    (dense / name).write_bytes((FUZZ / case).read_bytes())
    with pytest.raises(llamamoe.LlamaMoeError, match=name.split(".")[0]):
        convert(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_verify_compares_ids(dense: Path, tmp_path: Path) -> None:
    out = convert(dense, tmp_path / "out")
    assert llamamoe.verify(out, dense).passed
    text = json.loads((out / "tokenizer.json").read_text())
    text["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (out / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(llamamoe.VerificationError, match="tokenizer"):
        llamamoe.verify(out, dense)
