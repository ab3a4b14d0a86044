"""What the fuzzer damages, and the command that has to cope with it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.models import make_byte_level, make_dense

from .conftest import shard
from .mutations import damaged, damaged_bytes, damaged_json

FAMILIES = ("llama", "mistral-window", "qwen2-windows", "qwen3", "phi3-longrope", "phi3-partial", "granite", "gemma")
OUTPUTS = {"mixtral": "llama", "qwen2_moe": "llama", "glm4_moe": "llama", "granitemoeshared": "granite",
           "ernie4_5_moe": "llama", "qwen3_moe": "qwen3"}  # fmt: skip
CONFIG_KEYS = ("rope_scaling", "rope_theta", "head_dim", "sliding_window", "layer_types", "attention_bias", "auto_map",
               "quantization_config", "num_labels", "id2label", "torch_dtype", "partial_rotary_factor", "model_type",
               "architectures", "pruned_heads", "mlp_bias", "is_causal", "tie_word_embeddings", "llamamoe")  # fmt: skip
SIZES = ["--experts", "4", "--method", "random"]
ALL_ON = [*SIZES, "--top-k", "4", "--no-verify"]


@dataclass
class Attempt:
    """A command line, and what must hold if it succeeds.

    Attributes:
        arguments: Of the command ``llamamoe``.
        damage: What was done to the files.
        out: A checkpoint that the command publishes.
        parent: The dense checkpoint that it must compute the same as, all experts selected.
        ids: Whether it must make the ids that the parent makes.
    """

    arguments: list[str]
    damage: str
    out: Path | None = None
    parent: Path | None = None
    ids: bool = False
    files: list[Path] = field(default_factory=list)


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


# ---- sources -------------------------------------------------------------------------------------------------------


def _copied(original: Path, place: Path, name: str = "source") -> Path:
    return Path(shutil.copytree(original, place / name))


def config(world: World, rng: random.Random, place: Path) -> Attempt:
    """The configuration of a dense parent."""
    source = _copied(world.dense(rng.choice(FAMILIES)), place)
    content, done = damaged_json((source / "config.json").read_text(), rng, CONFIG_KEYS)
    (source / "config.json").write_bytes(content)
    if rng.random() < 0.3:
        return Attempt(["split", str(source), str(place / "out"), *ALL_ON, "--dry-run"], done)
    return Attempt(["split", str(source), str(place / "out"), *ALL_ON], done, place / "out", source, ids=True)


def tokenizer(world: World, rng: random.Random, place: Path) -> Attempt:
    """The files beside the weights: tokenizer, chat templates, generation configuration, card."""
    source = _copied(rng.choice((world.dense(), world.byte_level())), place)
    extra = {"special_tokens_map.json": '{"bos_token": "<bos>", "additional_special_tokens": ["<tool>"]}',
             "added_tokens.json": '{"<tool>": 127}', "README.md": "---\nlicense: mit\nlanguage: [en]\n---\n# x\n",
             "chat_template.jinja": "{{ messages }}", "merges.txt": "a b\n", "vocab.json": '{"a": 0}'}  # fmt: skip
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", *extra))
    path = source / name
    text = path.read_text() if path.exists() else extra[name]
    content, done = damaged_json(text, rng) if name.endswith(".json") else damaged_bytes(text.encode(), rng)
    path.write_bytes(content)
    return Attempt(
        ["split", str(source), str(place / "out"), *ALL_ON], f"{name}: {done}", place / "out", source, ids=True
    )


def weights(world: World, rng: random.Random, place: Path) -> Attempt:
    """A header of safetensors, or the index."""
    source = _copied(world.sharded(), place)
    path = rng.choice(sorted(source.glob("model*")))
    if path.suffix == ".json":
        content, done = damaged_json(path.read_text(), rng)
    elif rng.random() < 0.5:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, done = damaged_json(raw[8 : 8 + length].decode(), rng)
        content = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    else:
        content, done = damaged_bytes(path.read_bytes(), rng, within=2000)
    path.write_bytes(content)
    return Attempt(["split", str(source), str(place / "out"), *ALL_ON], f"{path.name}: {done}", place / "out", source)


def gguf(world: World, rng: random.Random, place: Path) -> Attempt:
    """The header of a GGUF file."""
    path = place / "source.gguf"
    content, done = damaged_bytes(world.gguf().read_bytes(), rng, within=3000)
    path.write_bytes(content)
    verb = rng.choice((["inspect", str(path)], ["split", str(path), str(place / "out"), *ALL_ON]))
    return Attempt(verb, done, place / "out" if verb[0] == "split" else None)


# ---- recipes -------------------------------------------------------------------------------------------------------


def recipe(world: World, rng: random.Random, place: Path) -> Attempt:
    """A recipe of any command, with paths that are there."""
    from importlib.resources import files

    kind, name = rng.choice((("split", "cmoe"), ("split", "calibrated"), ("split", "static"), ("split", "llama_moe_v2"),
                             ("pretrain", "stories260k"), ("compare", "quick"), ("heal", "default"),
                             ("tokenize", "small")))  # fmt: skip
    text = (files("llamamoe_recipes") / kind / f"{name}.yaml").read_text()
    data = yaml.safe_load(text)
    dense, out = str(world.dense()), str(world.output("mixtral"))
    real = {"calibration": str(world.text), "evaluation": str(world.text), "text": [str(world.text)],
            "tokenizer": dense, "model": out, "parent": dense}  # fmt: skip
    data |= {key: value for key, value in real.items() if key in data}
    if kind == "pretrain":
        data["data"] |= {"train": str(world.tokens()), "validation": None, "block_length": 16}
    data, done = damaged(data, rng)
    path = place / "recipe.yaml"
    content = yaml.safe_dump(data).encode("utf-8", "surrogatepass") if rng.random() < 0.9 else text.encode()
    if rng.random() < 0.15:
        content, more = damaged_bytes(content, rng)
        done += f"; {more}"
    path.write_bytes(content)
    arguments = {
        "split": ["split", dense, str(place / "out"), "--recipe", str(path), "--dry-run"],
        "pretrain": ["pretrain", "--recipe", str(path), "--out", str(place / "out"), "--dry-run"],
        "compare": ["compare", dense, "--out", str(place / "out"), "--recipe", str(path), "--dry-run"],
        "heal": ["heal", out, str(place / "out"), "--parent", dense, "--recipe", str(path), "--dry-run"],
        "tokenize": ["tokenize", "--out", str(place / "out"), "--recipe", str(path), "--dry-run"],
    }[kind]
    return Attempt(arguments, f"{kind}: {done}")


# ---- what we wrote -------------------------------------------------------------------------------------------------


def output(world: World, rng: random.Random, place: Path) -> Attempt:
    """A conversion of ours: configuration, receipt, recipe, tokenizer or header."""
    target = rng.choice(tuple(OUTPUTS))
    model, out = _copied(world.output(target), place, "model"), place / "out"
    name = rng.choice(("config.json",) * 6 + ("llamamoe_receipt.json", "llamamoe_recipe.yaml", "tokenizer_config.json",
                                              "tokenizer.json", "generation_config.json", "model.safetensors"))  # fmt: skip
    path = model / name
    if name.endswith(".json"):
        content, done = damaged_json(path.read_text(), rng, CONFIG_KEYS if name == "config.json" else ())
    elif name.endswith(".yaml"):
        data, done = damaged(yaml.safe_load(path.read_text()), rng)
        content = yaml.safe_dump(data).encode("utf-8", "surrogatepass")
    else:
        content, done = damaged_bytes(path.read_bytes(), rng, within=4000)
    path.write_bytes(content)
    dense = str(world.byte_level() if OUTPUTS[target] == "llama" else world.dense(OUTPUTS[target]))
    verbs: dict[str, list[str]] = {
        "retop": ["retop", str(model), str(out), "--top-k", "3"],
        "densify": ["densify", str(model), str(out)],
        "merge": ["merge", str(model), str(world.output(target)), "--out", str(out)],
        "inspect": ["inspect", str(model)],
        "fix-config": ["fix-config", str(model)],
        "export-gguf": ["export-gguf", str(model), str(place / "out.gguf")],
        "verify": ["verify", str(model), "--against", dense],
        "heal": ["heal", str(model), str(out), "--parent", dense, "--text", str(world.text), "--dry-run"],
        "evaluate": ["evaluate", str(model), "--text", str(world.text), "--device", "cpu"],
    }
    verb = rng.choice(tuple(verbs))
    published = out if verb in ("retop", "densify", "merge") else model if verb == "fix-config" else None
    return Attempt(verbs[verb], f"{target}/{name}: {done}", published)


SUBJECTS: dict[str, tuple[int, Callable[[World, random.Random, Path], Attempt]]] = {
    "config": (30, config),
    "tokenizer": (15, tokenizer),
    "weights": (10, weights),
    "gguf": (8, gguf),
    "recipe": (15, recipe),
    "output": (30, output),
}
"""How often of 108 times, and what."""
