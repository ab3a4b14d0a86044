"""Undamaged subjects of the fuzzer: checkpoints of every kind, text, tokens."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.dense import make_byte_level, make_dense

from .conftest import shard

OUTPUTS = {"mixtral": "llama", "qwen2_moe": "llama", "glm4_moe": "llama", "granitemoeshared": "granite",
           "ernie4_5_moe": "llama", "qwen3_moe": "qwen3"}  # fmt: skip
STAGES = {"pretrain": "train", "split": "convert", "tokenize": "tokenize"}
"""The stage in whose middle each kind of work is stopped."""
SIZES = ["--experts", "4", "--method", "random"]


class World:
    """Whole checkpoints, recipes and text, made once; attempts work on copies.

    Args:
        folder: Where they are made.
        run: Runs a command line, and fails if that fails.
    """

    def __init__(self, folder: Path, run: Callable[..., Any]) -> None:
        self.folder, self.run = folder, run
        self.text = folder / "text.jsonl"
        self.text.write_text("".join(json.dumps({"text": f"once upon a time {i} ago"}) + "\n" for i in range(40)))
        self.held_out = folder / "held_out.jsonl"
        self.held_out.write_text(
            "".join(json.dumps({"text": f"there was a cat of {i} tails"}) + "\n" for i in range(40))
        )

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def dense(self, variant: str = "llama") -> Path:
        """A dense checkpoint."""
        return self._made(f"dense-{variant}", lambda path: make_dense(path, variant, vocab_size=128))

    def byte_level(self) -> Path:
        """A dense checkpoint whose tokenizer llama.cpp knows, with a chat template."""

        def make(path: Path) -> None:
            make_dense(path, vocab_size=300)
            make_byte_level(path)

        return self._made("dense-bytes", make)

    def sharded(self) -> Path:
        """A dense checkpoint of two files and an index."""
        return self._made("dense-sharded", lambda path: shard(Path(shutil.copytree(self.dense(), path))))

    def output(self, target: str) -> Path:
        """A conversion."""
        shared = ["--shared", "40"] if target != "mixtral" and target != "qwen3_moe" else []
        source = self.byte_level() if OUTPUTS[target] == "llama" else self.dense(OUTPUTS[target])
        arguments = [*SIZES, "--top-k", "2", "--no-verify", "--target", target, *shared]
        return self._made(f"out-{target}", lambda path: self.run("split", source, path, *arguments))

    def gguf(self, family: str = "llama") -> Path:
        """A dense model in a GGUF file, with a byte-level vocabulary."""
        from llamamoe.checkpoint.gguf.vocabulary import read_vocabulary
        from tests.checkpoint.gguf.test_gguf import make_model, write_gguf

        vocabulary = read_vocabulary(self.byte_level(), 300)

        def make(path: Path) -> None:
            write_gguf(path, make_model(family, vocab_size=300), metadata=vocabulary.write)

        return self._made(f"dense-{family}.gguf", make)

    def tokens(self) -> Path:
        """A folder of tokens."""
        given = ["--set", "validation=null", "--recipe", "small", "--tokenizer", self.dense(), "--text", self.text]
        return self._made("tokens", lambda path: self.run("tokenize", "--out", path, *given))

    def byte_tokens(self) -> Path:
        """The same by the tokenizer of the conversions."""
        given = ["--set", "validation=null", "--recipe", "small", "--tokenizer", self.byte_level(), "--text", self.text]
        return self._made("tokens-bytes", lambda path: self.run("tokenize", "--out", path, *given))

    def training(self) -> Path:
        """A recipe of four steps of training."""
        from tests.training.runs import BASE

        model = self.output("mixtral")
        data = {"train": str(self.byte_tokens()), "validation": None, "block_length": 16}
        keys = {"model": str(model), "parent": None, "data": data, "steps": 4, "save_every": 1, "evaluate_every": 4}
        return self._made("training.yaml", lambda path: path.write_text(yaml.safe_dump(BASE | keys)))

    def tokenizing(self) -> Path:
        """A recipe that makes tokens of the text."""

        def domains(path: Path) -> None:
            for name in "abcd":
                (path / name).mkdir(parents=True)
                shutil.copy(self.text, path / name)

        text = str(self._made("domains", domains))
        given = {"tokenizer": str(self.dense()), "text": [text], "workers": 1}
        return self._made("tokenizing.yaml", lambda path: path.write_text(yaml.safe_dump(given)))

    def stopped(self, kind: str) -> Path:
        """A folder that holds what a stopped ``split``, ``tokenize`` or ``pretrain`` left, to be gone on with."""

        def make(path: Path) -> None:
            path.mkdir()
            with contextlib.suppress(KeyboardInterrupt):
                self._stop(kind, path / "out")

        return self._made(f"stopped-{kind}", make)

    def _stop(self, kind: str, out: Path) -> None:
        import llamamoe

        def stop(progress: Any) -> None:
            if progress.stage == STAGES[kind] and 2 * progress.done >= progress.total:
                raise KeyboardInterrupt

        if kind == "pretrain":
            llamamoe.pretrain(llamamoe.load_pretrain_recipe(self.training()), out, progress=stop)
        elif kind == "split":
            given = {"num_experts": 4, "method": "random", "top_k": 4}
            llamamoe.split(self.dense(), out, llamamoe.load_recipe(given=given), verify=False, progress=stop)
        else:
            llamamoe.tokenize(llamamoe.load_tokenize_recipe(self.tokenizing()), out, progress=stop)
