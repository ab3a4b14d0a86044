"""Small models' folders with a tokenizer, text in files, and what its tokens must be, written out plainly."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llamamoe.data.recipe import TokenizeRecipe, load_tokenize_recipe
from tests.dense import make_tokenizer


def make_model(folder: Path, vocab_size: int = 128) -> Path:
    """A folder with a configuration and a tokenizer of one token a character; no weights."""
    make_tokenizer(folder, vocab_size)
    return configure(folder, vocab_size)


def configure(folder: Path, vocab_size: int) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
    return folder


def make_model_with_bos(folder: Path, vocab_size: int = 70_000) -> Path:
    """One whose tokenizer puts <bos> before every text, of words, with more ids than 16 bits hold."""
    vocab = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return configure(folder, vocab_size)


def write_rows(path: Path, texts: Iterable[str], **row: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **row}) + "\n" for text in texts))
    return path


def make_text(folder: Path, seed: int = 0) -> dict[str, list[str]]:
    """Three files of two domains (``a`` in two files); returns the documents of each domain, in order."""
    rng = np.random.default_rng(seed)

    def documents(count: int) -> list[str]:
        return ["".join(map(chr, rng.integers(97, 123, size=rng.integers(1, 90)))) for _ in range(count)]

    texts = {"a/0": documents(20), "a/1": documents(31), "b/0": documents(17)}
    for name, found in texts.items():
        write_rows(folder / f"{name}.jsonl", found)
    return {"a": texts["a/0"] + texts["a/1"], "b": texts["b/0"]}


def recipe(model: Path, text: Path | None = None, **given: Any) -> TokenizeRecipe:
    """One worker, unless told otherwise."""
    data = {"tokenizer": str(model), "workers": 1} | ({} if text is None else {"text": str(text)})
    return load_tokenize_recipe(given=data | given)


def expected(model: Path, texts: Iterable[str]) -> list[int]:
    """The stream of a domain: what transformers makes of each document, and the end of sequence after it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return ids


def stream(folder: Path, domain: str, split: str = "train") -> list[int]:
    """The ids of a domain, read with nothing of ours."""
    index = json.loads((folder / "index.json").read_text())
    dtype = {"uint16": "<u2", "uint32": "<u4"}[index["dtype"]]
    files = [shard["file"] for shard in index["splits"][split][domain]["shards"]]
    return [int(i) for file in files for i in np.frombuffer((folder / file).read_bytes(), dtype)]
