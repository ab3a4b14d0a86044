"""Every command that takes a dense model takes every kind of it, and finds in it what it finds in its plain folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamamoe.checkpoint.gguf.reader import export_dense
from llamamoe.checkpoint.gguf.vocabulary import read_vocabulary
from tests.checkpoint.gguf.test_gguf import Kind, write_gguf
from tests.dense import make_byte_level, make_dense

from .conftest import Run

VOCAB = 300
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "intermediate_size": 192}
KINDS = ("sharded", "hub cache", "names in memory", "F32.gguf", "F16.gguf", "Q8_0.gguf")


def make_gguf(folder: Path, path: Path, kind: str, **vocabulary: Any) -> Path:
    """The model of a folder as a GGUF file with its tokenizer, of which ``vocabulary`` replaces parts."""

    def metadata(writer: Any) -> None:
        writer.add_vocab_size(VOCAB)
        dataclasses.replace(read_vocabulary(folder, VOCAB), **vocabulary).write(writer)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    write_gguf(path, model, Kind[kind], metadata=metadata)
    return path


def make_cache(folder: Path, cache: Path) -> Path:
    """The snapshot of a hub cache: links to files that are named by their hashes."""
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, run: Run) -> SimpleNamespace:
    """Parents of every kind, each with the plain folder of the same model, and what commands need beside them."""
    root = tmp_path_factory.mktemp("parents")
    dense = make_dense(root / "dense", **SIZES, max_position_embeddings=256)
    make_byte_level(dense)
    make_dense(root / "sharded", **SIZES, max_position_embeddings=256, max_shard_size="100KB")
    memory = root / "memory"
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(memory, save_original_format=False)
    for folder in (root / "sharded", memory):
        make_byte_level(folder)
    assert len(list((root / "sharded").glob("*.safetensors"))) > 1
    parents = {"sharded": root / "sharded", "hub cache": make_cache(dense, root / "cache"), "names in memory": memory}
    twins = dict.fromkeys(parents, dense)
    half, rounded = (
        make_dense(root / "half", **SIZES, max_position_embeddings=256, dtype=torch.float16),
        root / "rounded",
    )
    make_byte_level(half)
    for folder, kind, twin in ((dense, "F32", dense), (half, "F16", half), (dense, "Q8_0", rounded)):
        parents[f"{kind}.gguf"] = make_gguf(folder, root / f"{kind}.gguf", kind)
        twins[f"{kind}.gguf"] = twin
    export_dense(parents["Q8_0.gguf"], rounded, dtype="F32")
    text, held_out = root / "text.txt", root / "held-out.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8")[:5000], encoding="utf-8")
    held_out.write_text(Path(make_dense.__code__.co_filename).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    run("tokenize", "--recipe", "small", "--tokenizer", dense, "--text", text, "--out", root / "tokens",
        "--set", "validation=null")  # fmt: skip
    found = SimpleNamespace(root=root, dense=dense, parents=parents, twins=twins, text=text, held_out=held_out, run=run)
    found.moes, found.results = {}, {}
    return found


def moe(world: SimpleNamespace, parent: Path) -> Path:
    """A conversion of the parent, made once."""
    if parent not in world.moes:
        out = world.moes[parent] = world.root / f"moe-{len(world.moes)}"
        world.run("split", parent, out, "--experts", 4, "--top-k", 2, "--method", "random")
    return Path(world.moes[parent])


def data(world: SimpleNamespace, *args: Any) -> Any:
    return json.loads(world.run(*args, "--json").stdout)


def weights(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]


def inspect(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    found = data(world, "inspect", parent)
    return found["sizes"], found["cost"]["total_parameters"], found["refusal"]


def split(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    world.run(
        "split", parent, out, "--experts", 4, "--top-k", 2, "--calibration", world.text, "--calibration-tokens", 512
    )
    return weights(out)


def verify(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    found = data(world, "verify", moe(world, parent), "--against", parent)
    return found["passed"], found["neurons_checked"], found["copied_checked"]


def evaluate(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    return data(world, "evaluate", parent, "--text", world.held_out)["model"]["overall"]


def evaluate_against(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    found = data(world, "evaluate", moe(world, parent), "--against", parent, "--text", world.held_out)
    return found["comparable"], found["difference"]["overall"], found["against"]["dtype"]


def bench(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    small = ("--batch-sizes", 1, "--repeats", 1, "--new-tokens", 2, "--prompt", 8)
    found = data(world, "bench", moe(world, parent), "--against", parent, *small)["against"]
    assert found["speeds"][0]["decode_tokens_per_second"] > 0
    return found["dtype"], found["active_bytes"], found["flops_per_token"]


def report(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    page = out.with_suffix(".json")
    world.run("report", moe(world, parent), "--against", parent, "--text", world.held_out, "--json-out", page)
    found = json.loads(page.read_text(encoding="utf-8"))
    return found["parent"]["scores"], found["models"][0]["difference"]


def compare(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    found = data(
        world, "compare", parent, "--recipe", "quick", "--calibration", world.text, "--evaluation", world.held_out,
        "--out", out, "--only", "dense*", "--only", "static/*", "--set", "calibration_length=128",
        "--set", "context_length=128", "--set", "calibration_tokens=512",
    )  # fmt: skip
    assert not found["failed"]
    return [(row["method"], row["perplexity"]) for row in found["rows"]]


def budget(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    found = data(world, "budget", parent, "--calibration", world.text, "--calibration-tokens", 512)
    return found["layers"], found["keep_dense"]


def heal(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    args = ("--text", world.text, "--tokens", 512, "--set", "router=trained", "--set", "epochs=1")
    world.run("heal", moe(world, parent), out, "--parent", parent, *args)
    return weights(out)


def pretrain(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    keys = {"data.train": world.root / "tokens", "data.validation": "null", "steps": 2, "data.block_length": 32}
    keys |= {"batch_size": 2, "micro_batch_size": 2}
    sets = [each for key, value in keys.items() for each in ("--set", f"{key}={value}")]
    world.run(
        "pretrain", "--recipe", "stories260k", "--model", moe(world, parent), "--parent", parent, "--out", out, *sets
    )
    return weights(out / "model")


def densify(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    world.run("densify", moe(world, parent), out, "--like", parent)
    return weights(out)


def tokenize(world: SimpleNamespace, parent: Path, out: Path) -> Any:
    world.run("tokenize", "--recipe", "small", "--tokenizer", parent, "--text", world.text, "--out", out,
              "--set", "validation=null")  # fmt: skip
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    return index["splits"], index["tokenizer"]["ids_sha256"]


Verb = Callable[[SimpleNamespace, Path, Path], Any]
VERBS: tuple[Verb, ...] = (
    inspect, split, verify, evaluate, evaluate_against, bench, report, compare, budget, heal, pretrain, densify, tokenize,
)  # fmt: skip


OPENED_ALIKE = (verify, evaluate_against, bench, report, budget, heal, densify, tokenize)
"""For these a folder is like any other, and one quantisation like another."""
CASES = [
    (verb, kind) for verb in VERBS for kind in KINDS if verb not in OPENED_ALIKE or kind in ("F32.gguf", "F16.gguf")
]


@pytest.mark.parametrize(("verb", "kind"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_parent_of_any_kind_gives_what_its_folder_gives(
    world: SimpleNamespace, tmp_path: Path, verb: Verb, kind: str
) -> None:
    parent, twin = world.parents[kind], world.twins[kind]
    if (verb, twin) not in world.results:
        world.results[verb, twin] = verb(world, twin, tmp_path / "twin")
    assert verb(world, parent, tmp_path / "out") == world.results[verb, twin]


# ---- tokenizers of GGUF files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unknown_cut(world: SimpleNamespace) -> Path:
    """The model of the plain folder, with a tokenizer that cannot be rebuilt."""
    return make_gguf(world.dense, world.root / "unknown-cut.gguf", "F32", pre="nobody's")


@pytest.mark.parametrize("verb", [verify, heal, pretrain, densify], ids=lambda verb: verb.__name__)
def test_beside_a_conversion_its_tokenizer_is_used(
    world: SimpleNamespace, unknown_cut: Path, tmp_path: Path, verb: Verb
) -> None:
    world.moes[unknown_cut] = moe(world, world.dense)
    assert verb(world, unknown_cut, tmp_path / "out") == verb(world, world.dense, tmp_path / "plain")


@pytest.mark.parametrize(
    "verb", [split, evaluate, evaluate_against, bench, report, compare, budget], ids=lambda verb: verb.__name__
)
def test_a_tokenizer_can_be_given(world: SimpleNamespace, unknown_cut: Path, tmp_path: Path, verb: Verb) -> None:
    world.moes[unknown_cut] = moe(world, world.dense)
    given = SimpleNamespace(**vars(world) | {"run": lambda *args: world.run(*args, "--tokenizer", world.dense)})
    assert verb(given, unknown_cut, tmp_path / "out") == verb(world, world.dense, tmp_path / "plain")


def test_a_tokenizer_that_cannot_be_rebuilt_is_asked_for(world: SimpleNamespace, unknown_cut: Path) -> None:
    text = ("--text", world.text)
    for args in (
        ("split", unknown_cut, "--dry-run"),
        ("evaluate", unknown_cut, *text),
        ("evaluate", world.dense, "--against", unknown_cut, *text),
        ("bench", unknown_cut),
        ("budget", unknown_cut, "--calibration", world.text),
        ("compare", unknown_cut, "--recipe", "quick", "--dry-run"),
    ):
        assert 'tokenizer.ggml.pre = "nobody\'s"' in (said := world.run(*args, code=3).stderr), args
        assert "--tokenizer" in said
    found = json.loads(world.run("inspect", unknown_cut, "--json").stdout)  # its sizes can be told all the same
    assert found["cost"]["total_parameters"] > 0
    assert "--tokenizer" in found["refusal"]


def test_a_tokenizer_is_for_gguf_files_only(world: SimpleNamespace) -> None:
    for args in (("evaluate", world.dense, "--text", world.text), ("bench", world.dense)):
        assert "for GGUF files" in world.run(*args, "--tokenizer", world.dense, code=2).stderr


def test_a_gguf_parent_with_other_tokens_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    tokens = list(read_vocabulary(world.dense, VOCAB).tokens)
    tokens[50], tokens[51] = tokens[51], tokens[50]
    path = make_gguf(world.dense, tmp_path / "other.gguf", "F32", tokens=tokens)
    world.moes[path] = moe(world, world.dense)
    with pytest.raises(AssertionError, match="another vocabulary"):
        pretrain(world, path, tmp_path / "out")


def test_a_folder_around_a_gguf_file_names_the_file(world: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copy(world.parents["F32.gguf"], tmp_path / "model.gguf")
    for args in (
        ("inspect", tmp_path),
        ("split", tmp_path, "--dry-run"),
        ("evaluate", tmp_path, "--text", world.text),
        ("verify", moe(world, world.dense), "--against", tmp_path),
    ):
        assert str(tmp_path / "model.gguf") in "".join(world.run(*args, code=3).stderr.split("\n")), args


def test_a_gguf_file_in_the_place_of_a_conversion_names_what_makes_a_folder(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = world.parents["F32.gguf"], ("--text", world.text)
    pretraining = ("pretrain", "--recipe", "stories260k", "--dry-run", "--parent", world.dense, "--model", path)
    for args in (
        ("merge", path, world.dense, "--out", tmp_path / "out"),
        ("verify", path, "--against", world.dense),
        ("heal", path, "--parent", world.dense, *text, "--dry-run"),
        ("retop", path, tmp_path / "out", "--top-k", 1),
        ("densify", path, tmp_path / "out"),
        ("export-gguf", path, tmp_path / "out.gguf"),
        ("fix-config", path),
        (*pretraining, "--set", "data.validation=null", "--set", f"data.train={world.root / 'tokens'}"),
    ):
        said = world.run(*args, code=3).stderr
        assert "is a file, but a folder" in said, args
    joined = " ".join(said.split())
    [command] = re.findall(r'python -c "([^"]+)"', joined)
    monkeypatch.chdir(tmp_path)
    exec(command)  # what the message tells the reader to run
    assert weights(tmp_path / "FOLDER")
    assert evaluate(world, tmp_path / "FOLDER", tmp_path) == evaluate(world, world.dense, tmp_path)


def test_a_path_that_does_not_exist_is_told_alike(world: SimpleNamespace, tmp_path: Path) -> None:
    gone, text = tmp_path / "gone", ("--text", world.text)
    for args in (
        ("inspect", gone),
        ("split", gone, "--dry-run"),
        ("verify", gone, "--against", world.dense),
        ("verify", moe(world, world.dense), "--against", gone),
        ("evaluate", gone, *text),
        ("bench", gone),
        ("report", gone, *text, "--json-out", tmp_path / "report.json"),
        ("compare", gone, "--recipe", "quick", "--dry-run"),
        ("budget", gone, "--calibration", world.text),
        ("heal", gone, "--parent", world.dense, *text, "--dry-run"),
        ("merge", gone, world.dense, "--out", tmp_path / "out"),
        ("fix-config", gone),
        ("tokenize", "--recipe", "small", "--tokenizer", gone, *text, "--out", tmp_path / "out"),
    ):
        said = " ".join(world.run(*args, code=3).stderr.split())
        assert f"'{gone}' does not exist. Give" in said, args
    said = world.run("split", world.parents["F32.gguf"], "--dry-run", "--tokenizer", gone, code=3).stderr
    assert f"--tokenizer: '{gone}' is not a folder." in " ".join(said.split())
