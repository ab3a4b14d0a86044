"""Subjects that the fuzzer damages, with the command that has to handle them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamamoe.transforms.export_gguf import runs_in_llama_cpp

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
        kind: What was damaged, for counts.
        keeps: Whether what lay beside ``out`` may stay after a refusal.
    """

    arguments: list[str]
    damage: str
    out: Path | None = None
    parent: Path | None = None
    ids: bool = False
    kind: str = ""
    keeps: bool = False


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
        ["split", str(source), str(place / "out"), *ALL_ON],
        f"{name}: {done}",
        place / "out",
        source,
        ids=True,
        kind=name,
    )


def weights(world: World, rng: random.Random, place: Path) -> Attempt:
    """A header of safetensors, or the index."""
    source = _copied(world.sharded(), place)
    path = rng.choice(sorted(source.glob("model*")))
    part = "bytes"
    if path.suffix == ".json":
        content, done = damaged_json(path.read_text(), rng)
    elif rng.random() < 0.5:
        part = "header"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, done = damaged_json(raw[8 : 8 + length].decode(), rng)
        content = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    else:
        content, done = damaged_bytes(path.read_bytes(), rng, within=2000)
    path.write_bytes(content)
    arguments = ["split", str(source), str(place / "out"), *ALL_ON]
    return Attempt(arguments, f"{path.name}: {done}", place / "out", source, kind=f"{path.suffix} {part}")


def gguf(world: World, rng: random.Random, place: Path) -> Attempt:
    """The header of a GGUF file: its bytes, or well-formed metadata of other values."""
    path, original = place / "source.gguf", world.gguf(rng.choice(("llama", "granite", "qwen2")))
    kind = rng.choice(("bytes", "values", "values"))
    if kind == "values":
        done = _other_metadata(original, path, rng)
    else:
        content, done = damaged_bytes(original.read_bytes(), rng, within=rng.choice((500, 20_000)))
        path.write_bytes(content)
    verb = rng.choice((["inspect", str(path)], ["split", str(path), str(place / "out"), *ALL_ON]))
    return Attempt(verb, done, place / "out" if verb[0] == "split" else None, kind=kind)


def _other_metadata(original: Path, path: Path, rng: random.Random) -> str:
    """Write a GGUF file with one to three other values among its metadata."""
    import gguf
    import numpy as np

    from llamamoe.checkpoint.gguf.header import read_header

    header = read_header(original)
    lists = {key for key, value in header.metadata.items() if isinstance(value, list)}
    left = lists if rng.random() < 0.7 else set()  # they hold most of the values
    metadata, done = damaged({key: value for key, value in header.metadata.items() if key not in left}, rng)
    metadata |= {key: header.metadata[key] for key in left}
    writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture", "llama")).replace("\ud800", "?"))
    for key, value in metadata.items():
        kind = _gguf_type(value)
        if kind is None or (isinstance(value, list) and len({_gguf_type(each) for each in value}) != 1):
            done += f"; {key} left out"
        else:
            writer.add_key_value(key, value, kind)
    for name, tensor in header.tensors.items():
        size = int(np.prod(tensor.shape))
        writer.add_tensor(name, np.fromfile(original, np.float32, size, offset=tensor.offset).reshape(tensor.shape))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return done


def _gguf_type(value: Any) -> Any:
    """The type that holds a value, or None."""
    from gguf import GGUFValueType as Type

    if isinstance(value, bool | float):
        return Type.BOOL if isinstance(value, bool) else Type.FLOAT64
    if isinstance(value, int):
        fitting = [kind for kind, least, most in ((Type.UINT32, 0, 2**32), (Type.INT64, -(2**63), 2**63), (Type.UINT64, 0, 2**64))
                   if least <= value < most]  # fmt: skip
        return fitting[0] if fitting else None
    if isinstance(value, str):
        return Type.STRING if "\ud800" not in value else None
    if not isinstance(value, list) or not value or {_gguf_type(each) for each in value} & {None, Type.ARRAY}:
        return None
    large = any(isinstance(each, int) and not -(2**31) <= each < 2**31 for each in value)  # the writer takes int32
    return None if large else Type.ARRAY


# ---- recipes -------------------------------------------------------------------------------------------------------


def recipe(world: World, rng: random.Random, place: Path) -> Attempt:
    """A recipe of any command, with paths that are there."""
    from importlib.resources import files

    kind, name = rng.choice((("split", "cmoe"), ("split", "calibrated"), ("split", "static"), ("split", "llama_moe_v2"),
                             ("pretrain", "stories260k"), ("compare", "quick"), ("heal", "default"),
                             ("tokenize", "small")))  # fmt: skip
    text = (files("llamamoe_recipes") / kind / f"{name}.yaml").read_text()
    data = yaml.safe_load(text)
    dense, out = str(world.byte_level()), str(world.output("mixtral"))
    real = {"calibration": str(world.text), "evaluation": str(world.held_out), "text": [str(world.text)],
            "calibration_length": 32, "calibration_tokens": 256, "context_length": 32, "tokenizer": dense, "model": out,
            "parent": dense}  # fmt: skip
    data |= {key: value for key, value in real.items() if key in data}
    if kind == "split":  # for the models of the world; without damage every recipe is accepted
        data |= {"calibration": str(world.text), "num_experts": 4, "top_k": 2}
    if kind == "pretrain":
        data["data"] |= {"train": str(world.byte_tokens()), "validation": None, "block_length": 16}
    data, done = damaged(data, rng)
    path = place / "recipe.yaml"
    content = yaml.safe_dump(data).encode("utf-8", "surrogatepass")
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
    return Attempt(arguments, f"{kind}: {done}", kind=kind)


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
        "resplit": ["resplit", str(model), str(out), "--pieces", "2"],
        "densify": ["densify", str(model), str(out)],
        "merge": ["merge", str(model), str(world.output(target)), "--out", str(out)],
        "inspect": ["inspect", str(model)],
        "fix-config": ["fix-config", str(model)],
        "export-gguf": ["export-gguf", str(model), str(place / "out.gguf")],
        "verify": ["verify", str(model), "--against", dense],
        "heal": ["heal", str(model), str(out), "--parent", dense, "--text", str(world.text), "--dry-run"],
        "evaluate": ["evaluate", str(model), "--text", str(world.text), "--device", "cpu"],
        "report": ["report", str(model), "--text", str(world.text), "--json-out", str(place / "report.json")],
        "bench": ["bench", str(model), "--device", "cpu", "--prompt", "4", "--new-tokens", "2", "--batch-sizes", "1",
                  "--repeats", "1"],
        "pretrain": ["pretrain", "--recipe", str(world.training()), "--out", str(place / "run"), "--model", str(model),
                     "--set", "steps=1", *rng.choice(([], ["--dry-run"]))],
        "tokenize": ["tokenize", "--recipe", "small", "--tokenizer", str(model), "--text", str(world.text), "--out", str(out)],
    }  # fmt: skip
    if not runs_in_llama_cpp(world.output(target)):  # it refuses other architectures at once
        del verbs["export-gguf"]
    verb = rng.choice(tuple(verbs))
    published = out if verb in ("retop", "resplit", "densify", "merge") else model if verb == "fix-config" else None
    return Attempt(verbs[verb], f"{target}/{name}: {done}", published, kind=name)


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
    return Attempt(verb, f"{path.name}: {done}", kind="".join(path.suffixes))


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
    return Attempt(verb, f"{path.name}: {done}", kind=path.suffix)


def stopped(world: World, rng: random.Random, place: Path) -> Attempt:
    """Damage the files of an interrupted split, tokenize or pretrain, from which it resumes."""
    verb = rng.choice(("split", "split", "tokenize", "pretrain"))
    shutil.copytree(world.stopped(verb), place, dirs_exist_ok=True)
    path = rng.choice(sorted(each for each in place.rglob("*") if each.is_file()))
    if rng.random() < 0.1:
        path.unlink()
        done = "delete"
    else:
        json_like = path.suffix == ".json" and path.stat().st_size
        raw = path.read_bytes()
        content, done = damaged_json(raw.decode(), rng) if json_like else damaged_bytes(raw, rng)
        path.write_bytes(content)
    dense, out = world.dense(), place / "out"
    arguments = {"split": [str(dense), str(out), *ALL_ON],
                 "tokenize": ["--recipe", str(world.tokenizing()), "--out", str(out)],
                 "pretrain": ["--recipe", str(world.training()), "--out", str(out)]}[verb]  # fmt: skip
    name = path.relative_to(place)
    published = out if verb == "split" else out / "model" if verb == "pretrain" else None
    return Attempt([verb, *arguments, "--resume"], f"{name}: {done}", published, dense if verb == "split" else None,
                   kind=f"{verb} {path.name}", keeps=True)  # fmt: skip


SUBJECTS: dict[str, tuple[int, Callable[[World, random.Random, Path], Attempt]]] = {
    "config": (30, config),
    "tokenizer": (15, tokenizer),
    "weights": (10, weights),
    "gguf": (8, gguf),
    "recipe": (15, recipe),
    "output": (30, output),
    "text": (6, text),
    "tokens": (4, tokens),
    "stopped": (8, stopped),
}
"""Frequency of each subject out of 126 runs."""
