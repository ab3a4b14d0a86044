"""The tokenizer of a conversion makes the ids of its parent's, whatever files the parent has."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llamamoe import split, verify
from llamamoe.checkpoint import tokenizer_loading
from llamamoe.checkpoint.readme import parent_metadata
from llamamoe.checkpoint.tokenizer_difference import PROBES, difference, ids_sha256
from llamamoe.conversion.recipe import build_recipe
from llamamoe.conversion.split import plan_conversion
from llamamoe.errors import CheckpointError, VerificationError
from llamamoe.models.loading import open_model
from llamamoe.training.parent import _check_tokenizers

from ..paths import SHARED_DATA, needs_shared_data

TARGETS = ("qwen2_moe", "mixtral", "granitemoeshared", "glm4_moe", "ernie4_5_moe")
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
pytestmark = needs_shared_data
STORIES = SHARED_DATA / "models" / "stories260k"
CASES_DIR = SHARED_DATA.parent / "cases"


def without_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def llama_class(folder: Path) -> None:
    config = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer", "legacy": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def gpt2_files(folder: Path) -> None:
    """vocab.json and merges.txt of a byte-level tokenizer, with the class GPT2Tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*PROBES] * 3, trainer)
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def qwen2_files(folder: Path) -> None:
    gpt2_files(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))


def qwen2_files_of_a_llama(folder: Path) -> None:
    """A byte-level tokenizer that calls itself a Llama's: transformers passes over the class."""
    qwen2_files(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))


INFILLING = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


def code_llama(folder: Path) -> None:
    """The last characters of the vocabulary become the tokens of infilling, as in Code Llama's."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    for old, new in zip(sorted(vocab, key=vocab.get)[-len(INFILLING) :], INFILLING, strict=True):
        assert not any(old in merge for merge in data["model"]["merges"])  # nothing is merged with it
        vocab[new] = vocab.pop(old)
        data["added_tokens"].append({**data["added_tokens"][0], "id": vocab[new], "content": new})
    path.write_text(json.dumps(data))
    code_llama_class(folder)


def code_llama_class(folder: Path) -> None:
    """Without these tokens, as in those of 34B: the class adds them behind the vocabulary."""
    llama_class(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "CodeLlamaTokenizer"}))


def templates(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools" + TEMPLATE)


CASES = {
    f.__name__: f for f in (without_config, llama_class, gpt2_files, qwen2_files, qwen2_files_of_a_llama, templates)
}


def parent_of(folder: Path, change: Any = None) -> Path:
    shutil.copytree(STORIES, folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    if change:
        change(folder)
    return folder


def recipe_for(target: str) -> Any:
    return build_recipe({"target": target, "num_experts": 4, "top_k": 2, "method": "random"})


def opened(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_ids_are_the_parents(tmp_path: Path, case: str, target: str) -> None:
    parent = parent_of(tmp_path / "parent", CASES[case])
    out = tmp_path / "out"
    split(parent, out, recipe_for(target), verify=False)
    before, after = opened(parent), opened(out)
    for text in PROBES:
        assert after(text).input_ids == before(text).input_ids
        assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
    assert after.chat_template == before.chat_template
    assert difference(before, after) is None
    assert ids_sha256(before) == ids_sha256(after)
    _check_tokenizers(before, parent, out)


FILLED = ("def f(x):<FILL_ME>\n    return x", "a b<FILL_ME>c d", "<FILL_ME>x")


@pytest.mark.parametrize("case", [code_llama, code_llama_class])
@pytest.mark.parametrize("target", TARGETS[:2])
def test_infilling_is_given_up_and_the_way_out_is_told(tmp_path: Path, target: str, case: Any) -> None:
    parent, out = parent_of(tmp_path / "parent", case), tmp_path / "out"
    recipe = recipe_for(target)
    [told] = [each for each in plan_conversion(parent, recipe).warnings if "<FILL_ME>" in each]
    assert "ids of all other text are the same" in told
    assert "tokenize with the parent's folder" in told
    split(parent, out, recipe, verify=False)
    verify(out, parent)
    before, after = opened(parent), opened(out)
    assert "<FILL_ME>" not in after.get_vocab(), "it would have no row in the embedding"
    special = set(after.convert_tokens_to_ids([*INFILLING]))
    for text in [*PROBES, *INFILLING, " ▁<PRE> a ▁<SUF>b ▁<MID>"]:
        assert after(text).input_ids == before(text).input_ids
    for text in FILLED:  # later, as the parent's makes other ids of some plain text once it has filled in
        prompt = before(text).input_ids
        assert special & set(prompt)
        assert after.convert_ids_to_tokens(prompt) == before.convert_ids_to_tokens(prompt)
        assert not special & set(after(text).input_ids)


def test_text_about_infilling_is_text(tmp_path: Path) -> None:
    """Transformers' tokenizer raises over the second one."""
    parent = parent_of(tmp_path / "parent", code_llama)
    ids = open_model(parent).tokenizer("<FILL_ME> and <FILL_ME>").input_ids
    assert max(ids) < 508


def small(parent: Path, out: Path, **keys: Any) -> Any:
    return split(parent, out, recipe_for("qwen2_moe"), **keys)


def test_bits_per_byte_are_the_parents_without_a_tokenizer_config(tmp_path: Path) -> None:
    from llamamoe import evaluate

    parent, out = parent_of(tmp_path / "parent", without_config), tmp_path / "out"
    small(parent, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 4}))
    text = [SHARED_DATA / "tinystories" / "valid.jsonl"]
    before, after = (evaluate(each, text, max_tokens=3000) for each in (parent, out))
    assert before.model.overall.bits_per_byte < 1.5
    assert after.model.overall.bits_per_byte == pytest.approx(before.model.overall.bits_per_byte, rel=1e-3)


def test_verify_finds_another_tokenizer(tmp_path: Path) -> None:
    parent, out = parent_of(tmp_path / "parent"), tmp_path / "out"
    small(parent, out)
    verify(out, parent)
    path = out / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(data))
    with pytest.raises(VerificationError, match="differs from its parent's"):
        verify(out, parent)


def test_no_tokenizer_is_said_in_the_plan(tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent")
    for path in parent.glob("tokenizer*"):
        path.unlink()
    (parent / "tekken.json").write_text("{}")
    plan = plan_conversion(parent, recipe_for("mixtral"))
    assert any("no tokenizer" in each for each in plan.warnings)
    split(parent, tmp_path / "out", recipe_for("mixtral"))
    assert not list((tmp_path / "out").glob("*te*en*.json"))


def test_a_tokenizer_larger_than_the_embedding_is_warned_of(tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent")
    data = json.loads((parent / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 512, "content": "<more>"})
    (parent / "tokenizer.json").write_text(json.dumps(data))
    assert any("513 tokens" in each for each in plan_conversion(parent, recipe_for("mixtral")).warnings)


@pytest.mark.parametrize("name", ["tok-15-0-tokenizer.json", "tok-15-9-tokenizer.json", "gen-14-16.json"])
def test_broken_side_files_are_refused_in_the_plan(tmp_path: Path, name: str) -> None:
    parent = parent_of(tmp_path / "parent")
    there = "generation_config.json" if name.startswith("gen") else "tokenizer.json"
    (parent / there).write_bytes((CASES_DIR / "fuzz" / name).read_bytes())
    with pytest.raises(CheckpointError, match=there):
        plan_conversion(parent, recipe_for("mixtral"))


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent")
    (parent / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError) as caught:
        plan_conversion(parent, recipe_for("mixtral"))
    assert "git lfs pull" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    parent = parent_of(tmp_path / "parent")
    (parent / name).unlink(missing_ok=True)
    os.mkfifo(parent / name)
    with pytest.raises(CheckpointError):
        plan_conversion(parent, recipe_for("mixtral"))


@pytest.mark.parametrize("name", ["date-README.md", "alias-bomb-README.md"])
def test_a_card_gives_plain_strings_only(tmp_path: Path, name: str) -> None:
    shutil.copyfile(CASES_DIR / "readme" / name, tmp_path / "README.md")
    assert all(isinstance(v, str | list) for v in parent_metadata(tmp_path).values())
    assert len(str(parent_metadata(tmp_path))) < 1000
    assert "license" not in parent_metadata(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "out", "nested"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "parent"
    folder.mkdir()
    card, other = folder / "README.md", tmp_path / "other.md"
    other.write_text("---\nlicense: mit\n---\n")
    make = {
        "pipe": lambda: os.mkfifo(card),
        "device": lambda: card.symlink_to("/dev/zero"),
        "out": lambda: card.symlink_to(other),
        "nested": lambda: card.write_text("---\nlicense: mit\na: " + "[" * 2000 + "]" * 2000 + "\n---\n"),
    }
    make[kind]()
    assert parent_metadata(folder) == {}


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.mark.parametrize(
    ("content", "there", "lacking"),
    [
        (SENTENCEPIECE, set(), ["sentencepiece", "protobuf"]),
        (SENTENCEPIECE, {"sentencepiece", "tiktoken"}, ["protobuf"]),
        (SENTENCEPIECE, {"protobuf"}, ["sentencepiece"]),
        (SENTENCEPIECE, {"sentencepiece", "protobuf"}, []),
        (b"IQ== 0\nIg== 1\n", {"sentencepiece", "protobuf"}, ["tiktoken"]),
    ],
)
def test_the_packages_that_a_vocabulary_needs_are_named(
    content: bytes, there: set[str], lacking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers asks for tiktoken whichever of them is missing."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(tokenizer_loading, "_installed", there.__contains__)
    with pytest.raises(CheckpointError) as caught, tokenizer_loading.one_error("it", tmp_path):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")
    told = f"pip install {' '.join(lacking)}, or save it" if lacking else "Correct the file"
    assert told in (caught.value.hint or "")
    assert ("tiktoken" in str(caught.value)) is (lacking in ([], ["tiktoken"]))


def test_sentencepiece_alone_loads_the_same_or_names_the_package(tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent")
    for path in parent.glob("tokenizer*"):
        path.unlink()
    (parent / "tokenizer.model").write_bytes(SENTENCEPIECE)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        small(parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
