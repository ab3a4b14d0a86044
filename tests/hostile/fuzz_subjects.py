"""What the fuzzer damages, and the command that has to cope with it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .fuzz_world import OUTPUTS, SIZES, World
from .mutations import damaged, damaged_bytes, damaged_json

FAMILIES = ("llama", "mistral-window", "qwen2-windows", "qwen3", "phi3-longrope", "phi3-partial", "granite", "gemma")
CONFIG_KEYS = ("rope_scaling", "rope_theta", "head_dim", "sliding_window", "layer_types", "attention_bias", "auto_map",
               "quantization_config", "num_labels", "id2label", "torch_dtype", "partial_rotary_factor", "model_type",
               "architectures", "pruned_heads", "mlp_bias", "is_causal", "tie_word_embeddings", "llamamoe")  # fmt: skip
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


# ---- sources -------------------------------------------------------------------------------------------------------


def _copied(original: Path, place: Path, name: str = "source") -> Path:
    return Path(shutil.copytree(original, place / name))


def config(world: World, rng: random.Random, place: Path) -> Attempt:
    """The configuration of a dense parent."""
    source = _copied(world.dense(rng.choice(FAMILIES)), place)
    content, done = damaged_json((source / "config.json").read_text(), rng, CONFIG_KEYS)
    (source / "config.json").write_bytes(content)
    text = ["--text", str(world.text), "--device", "cpu"]
    if rng.random() < 0.3:
        verb = rng.choice((["split", str(source), str(place / "out"), *ALL_ON, "--dry-run"], ["inspect", str(source)],
                           ["evaluate", str(source), *text],
                           ["budget", str(source), "--budget", "0.7", "--calibration", str(world.text), *SIZES],
                           ["compare", str(source), "--recipe", "quick", "--calibration", str(world.text),
                            "--evaluation", str(world.text), "--out", str(place / "study"), "--dry-run"]))  # fmt: skip
        return Attempt(verb, done)
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
        "report": ["report", str(model), "--text", str(world.text), "--json-out", str(place / "report.json")],
        "bench": [
            "bench",
            str(model),
            "--device",
            "cpu",
            "--prompt",
            "4",
            "--new-tokens",
            "2",
            "--batch-sizes",
            "1",
            "--repeats",
            "1",
        ],
    }
    verb = rng.choice(tuple(verbs))
    published = out if verb in ("retop", "densify", "merge") else model if verb == "fix-config" else None
    return Attempt(verbs[verb], f"{target}/{name}: {done}", published)


def text(world: World, rng: random.Random, place: Path) -> Attempt:
    """Text, plain or compressed, that is read for calibration or tokenised."""
    import gzip

    content, done = world.text.read_bytes(), ""
    for _ in range(rng.choice((1, 2))):
        content, more = damaged_bytes(content, rng) if rng.random() < 0.6 else _odd_row(content, rng)
        done += more + "; "
    packed = rng.random() < 0.3
    path = place / ("text.jsonl.gz" if packed else rng.choice(("text.jsonl", "text.jsonl", "text.txt", "text.parquet")))
    if packed:
        content, more = (
            damaged_bytes(gzip.compress(content), rng) if rng.random() < 0.5 else (gzip.compress(content), "")
        )
        done += f"gzip {more}"
    path.write_bytes(content)
    dense = str(world.dense())
    verb = rng.choice((["tokenize", "--recipe", "small", "--tokenizer", dense, "--text", str(path), "--out", str(place / "t")],
                       ["evaluate", dense, "--text", str(path), "--device", "cpu"]))  # fmt: skip
    return Attempt(verb, f"{path.name}: {done}")


def _odd_row(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    rows = content.split(b"\n")
    row = rng.choice((b'{"text": 1}', b'{"text": null}', b"[]", b'{"text": "\\ud800"}', b"{" * 3000, b"\xff\xfe", b"",
                      b'{"text": "a", "text": "b"}', b'{"text": "' + b"x" * 10**5 + b'"}', b'{"domain": [], "text": "a"}',
                      b'{"text": "a", "n": 1' + b"0" * 9000 + b"}", b'{"domain": "../../x", "text": "\\u0000"}'))  # fmt: skip
    rows[rng.randrange(len(rows))] = row
    return b"\n".join(rows), f"a row {row[:30]!r}"


def tokens(world: World, rng: random.Random, place: Path) -> Attempt:
    """A folder of tokens that is trained on."""
    folder = _copied(world.tokens(), place, "tokens")
    path = rng.choice((folder / "index.json", *sorted(folder.rglob("*.bin"))))
    content, done = (
        damaged_bytes(path.read_bytes(), rng) if path.suffix == ".bin" else damaged_json(path.read_text(), rng)
    )
    path.write_bytes(content)
    given = ["--set", f"model={world.output('qwen3_moe')}", "--set", "parent=null", "--set", f"data.train={folder}",
             "--set", "data.validation=null", "--set", "data.block_length=16", "--set", "distill=null"]  # fmt: skip
    verb = ["pretrain", "--recipe", "stories260k", "--out", str(place / "run"), *given, "--dry-run"]
    return Attempt(verb, f"{path.name}: {done}")


SUBJECTS: dict[str, tuple[int, Callable[[World, random.Random, Path], Attempt]]] = {
    "config": (30, config),
    "tokenizer": (15, tokenizer),
    "weights": (10, weights),
    "gguf": (8, gguf),
    "recipe": (15, recipe),
    "output": (30, output),
    "text": (6, text),
    "tokens": (4, tokens),
}
"""How often of 118 times, and what."""
