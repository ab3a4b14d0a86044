"""What the fuzzer damages, whole: checkpoints of every kind, text, tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models import make_byte_level, make_dense

from .conftest import shard

OUTPUTS = {"mixtral": "llama", "qwen2_moe": "llama", "glm4_moe": "llama", "granitemoeshared": "granite",
           "ernie4_5_moe": "llama", "qwen3_moe": "qwen3"}  # fmt: skip
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

    def gguf(self) -> Path:
        """A dense model in a GGUF file."""
        from tests.checkpoint.test_gguf import make_model, write_gguf

        return self._made("dense.gguf", lambda path: write_gguf(path, make_model()))

    def tokens(self) -> Path:
        """A folder of tokens."""
        given = ["--set", "validation=null", "--recipe", "small", "--tokenizer", self.dense(), "--text", self.text]
        return self._made("tokens", lambda path: self.run("tokenize", "--out", path, *given))
