"""The page of ``--json`` output: commands run on a tiny model that is made on the spot, so the page is correct."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import transformers
from click.testing import CliRunner

from llamamoe import lazy
from tests.dense import make_byte_level, make_dense

from .markdown import code, prose, table

HEAD = """# JSON output

With `--json` a command prints exactly one JSON document on stdout; progress and warnings stay on stderr, and the exit code is
the same. Numbers that JSON cannot hold (NaN, infinity) are `null`. Keys may be added in any version; a key that is removed or
changes its meaning is named in the [changelog](../changelog.md).

The tables list the keys of each document with the type and the value that one run printed. `[]` stands for the items of a list, and
`{}` for keys that depend on the model or the text. Each document has a
[JSON Schema](https://json-schema.org), which lists the types of all keys at any depth and requires none.
"""
WORDS = ["assert", "the", "class", "of", "a", "statement", "None", "is", "in"]
SPLIT = "--experts 4 --top-k 2 --calibration text.txt --calibration-tokens 512 --calibration-length 32 --method token_clusters"
RUNS: dict[str, tuple[str, str]] = {
    "inspect": ("inspect dense", "llamamoe.architectures.inspect.Inspection"),
    "split --dry-run": (f"split dense moe {SPLIT} --dry-run", "llamamoe.conversion.plan.SplitPlan"),
    "split": (f"split dense moe {SPLIT}", "llamamoe.conversion.split.SplitResult"),
    "verify": ("verify moe --against dense", "llamamoe.conversion.verify.Verification"),
    "evaluate": ("evaluate moe --against dense --text text.txt --max-tokens 256", "llamamoe.evaluation.scores.Evaluation"),
    "bench": ("bench moe --against dense --batch-sizes 1 --prompt 8 --new-tokens 2 --repeats 1", "llamamoe.evaluation.bench.Benchmark"),
    "tokenize": ("tokenize --recipe small --tokenizer dense --text text.txt --set validation=null --workers 1 --out tokens", "llamamoe.data.tokenize.Tokenized"),
    "pretrain --dry-run": ("pretrain --recipe stories260k --model moe --parent dense --out run --dry-run --set data.train=tokens "
                           "--set data.validation=null --set data.block_length=16", "llamamoe.training.plan.PretrainPlan"),
    "retop": ("retop moe retopped --top-k 3", "llamamoe.transforms.retop.RetopResult"),
    "resplit": ("resplit moe finer --pieces 2", "llamamoe.transforms.resplitting.plan.ResplitResult"),
    "merge": ("merge moe moe --out merged", "llamamoe.transforms.merge.MergeResult"),
    "mix": ("mix dense mixed --expert dense --expert dense", "llamamoe.transforms.mix.MixResult"),
    "push --dry-run": ("push moe me/moe --dry-run", "llamamoe.checkpoint.push.Push"),
    "fix-config --dry-run": ("fix-config moe --dry-run", ""),
    "methods": ("methods kmeans", "llamamoe.catalog.Method"),
}  # fmt: skip
"""The command that is run, and the class whose docstring describes its keys."""
NOT_RUN = {"bench --program llama.cpp": "llamamoe.studies.speed.bench_llama_cpp.LlamaCppSpeeds"}
"""Commands that need another program: their keys are described without types and examples."""
PARTS = {
    "inspect": {
        "cost": "llamamoe.architectures.costs.Cost",
        "experts": "llamamoe.architectures.stored_experts.Experts",
    },
    "split": {"plan": "llamamoe.conversion.plan.SplitPlan", "verification": "llamamoe.conversion.verify.Verification"},
    "evaluate": dict.fromkeys(("model", "against"), "llamamoe.evaluation.scores.ModelScores"),
    "bench": dict.fromkeys(("model", "against"), "llamamoe.evaluation.speeds.ModelSpeed"),
    "methods": {"options": "llamamoe.catalog.Option"},
}
"""The classes of parts of a document, by the keys that lead to them."""
OF_THE_MACHINE = r"run\.|platform|threads|torch|seconds|tokens_per_second"
"""Keys whose values depend on the machine and the hour; no example is shown."""
DEPTH = 2


def pages() -> dict[str, str]:
    """Return the page and the schemas."""
    parts, made = [HEAD], {}
    for name, (_, cls) in RUNS.items():
        document = _documents()[name]
        file = f"reference/json/{name.replace(' --', '-')}.schema.json"
        made[file] = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"llamamoe {name} --json"}
                                | schema(document), indent=2)  # fmt: skip
        parts.append(f"## {name}\n\n[Schema]({file.removeprefix('reference/')})\n")
        about = _attributes(cls)
        for part, inner in PARTS.get(name, {}).items():
            about |= {f"{part}.{key}": text for key, text in _attributes(inner).items()}
        rows = [(code(path), kind, code(value) if value and not re.search(OF_THE_MACHINE, path) else "", about.get(path.replace("[]", "").lstrip("."), ""))
                for path, kind, value in _rows(document, "", DEPTH)]  # fmt: skip
        parts.append(table(("key", "type", "example", "what it is"), rows))
    for name, cls in NOT_RUN.items():
        rows = [
            ("`program`", "The program that ran the models."),
            *((code(key), text) for key, text in _attributes(cls).items()),
        ]
        parts.append(f"## {name}\n\n{table(('key', 'what it is'), rows)}")
    return made | {"reference/json.md": "\n".join(parts)}


@functools.cache
def _documents() -> dict[str, Any]:
    """Run every command and return what it printed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        _make_material(Path(folder))
        root = importlib.import_module("llamamoe_cli.main").root
        for name, (command, _) in RUNS.items():
            result = CliRunner().invoke(root, [*command.split(), "--json"])
            if result.exit_code:
                raise RuntimeError(f"llamamoe {command}: {result.output}")
            found[name] = json.loads(result.stdout)
    return found


def _make_material(folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    make_byte_level(make_dense(folder / "dense", "llama-tied", max_position_embeddings=128, vocab_size=300), "smollm")
    order = lazy.np.random.default_rng(0).choice(WORDS, 600)
    (folder / "text.txt").write_text("\n\n".join(" ".join(part) for part in order.reshape(20, 30)))


def schema(value: Any) -> dict[str, Any]:
    """Return a JSON Schema that allows the value, with the types of all its keys."""
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: schema(each) for key, each in value.items()}}
    if isinstance(value, list):
        return {"type": "array"} | ({"items": schema(value[0])} if value else {})
    return {"type": [_kind(value), "null"]} if value is not None else {}


def _rows(value: Any, path: str, depth: int) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, list) and value and isinstance(value[0], dict) and (depth or not path):
        yield from _rows(value[0], f"{path}[]", depth)
    elif isinstance(value, dict) and value and depth >= 0 and (depth or not path):
        for key, each in value.items():
            here = f"{path}.{key}" if path else key
            if isinstance(each, dict) and each and _by_data(each):
                yield here + ".{}", _kind(next(iter(each.values()))), ""
            elif isinstance(each, dict) and each and depth > 1:
                yield here, "object", ""
                yield from _rows(each, here, depth - 1)
            elif isinstance(each, list) and each and isinstance(each[0], dict) and depth > 1:
                yield from _rows(each[0], f"{here}[]", depth - 1)
            else:
                yield here, _kind(each), _example(each)
    else:
        yield path, _kind(value), _example(value)


def _by_data(value: dict[str, Any]) -> bool:
    """Tell keys that are layers, tensors, files or hashes from keys that are names of ours."""
    return not all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in value)


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return kinds.get(type(value), "null")


def _example(value: Any) -> str:
    if isinstance(value, dict | list):
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 and not re.search(r"/tmp|/var", text) else ""


def _attributes(cls: str) -> dict[str, str]:
    """Return what the docstring of a class says of its attributes."""
    if not cls:
        return {}
    module, name = cls.rsplit(".", 1)
    text = getattr(importlib.import_module(module), name).__doc__ or ""
    block = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", block, re.DOTALL | re.MULTILINE)
    return {key: prose(" ".join(about.split())) for key, about in found}
