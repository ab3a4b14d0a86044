"""Tiny training runs: a random dense model, its conversion, and tokens of made-up text in two domains."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamamoe import load_recipe, split, tokenize
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.training.recipe import PretrainRecipe, load_pretrain_recipe

from ..dense import make_dense
from ..forked import Forks

BLOCK = 16
BASE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "micro_batch_size": 4,
    "optimizer": {"lr": 2e-3, "weight_decay": 0.01},
    "lr_schedule": {"warmup": 0},
    "precision": {"compute": "float32", "parent": "float32"},
    "device": "cpu",
    "log_every": 1,
    "evaluate_every": 3,
    "save_every": 2,
    "keep": 99,
}


def make_text(folder: Path, seed: int, documents: int = 60) -> None:
    """Two domains of words that follow one another by chance: one in capitals, one in small letters."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for name, letters in (("large", "ABCDEFGH"), ("small", "abcdefgh")):
        rows = []
        for _ in range(documents):
            at, word = rng.randrange(8), []
            for _ in range(40):
                at = (at + rng.choice((1, 1, 1, 3))) % 8
                word.append(letters[at])
            rows.append(json.dumps({"text": "".join(word)}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def make_tokens(folder: Path, tokenizer: Path, seed: int) -> Path:
    """A folder of tokens."""
    make_text(folder / "text", seed)
    return tokenized(folder / "text", folder / "tokens", tokenizer)


def tokenized(text: Path, out: Path, tokenizer: Path | str) -> Path:
    """A folder of tokens of a folder of text."""
    tokenize(load_tokenize_recipe(given={"tokenizer": str(tokenizer), "text": [str(text)], "workers": 1}), out)
    return out


def make_world(
    folder: Path,
    *,
    variant: str = "llama",
    target: str = "auto",
    top_k: int = 2,
    dense: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, str]:
    """Dense model (with these sizes), converted model and tokens; returns their paths by the recipe's keys."""
    source = make_dense(folder / "dense", variant, num_hidden_layers=2, **(dense or {}))
    given = {"num_experts": 4, "top_k": top_k, "method": "random", "target": target, **keys}
    split(source, folder / "moe", load_recipe(given=given), verify=False)
    return {
        "model": str(folder / "moe"),
        "parent": str(source),
        "train": str(make_tokens(folder / "train", source, 0)),
        "validation": str(make_tokens(folder / "valid", source, 1)),
    }


def recipe_of(world: dict[str, str], *overrides: str, **keys: Any) -> PretrainRecipe:
    """A recipe on that world."""
    data = {"train": world["train"], "validation": world["validation"], "block_length": BLOCK, "validation_blocks": 6}
    given = BASE | {"model": world["model"], "parent": world["parent"], "data": data} | keys
    return load_pretrain_recipe(given=given, overrides=overrides)


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The metrics without what differs from run to run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time")
    return lines


def start(
    recipe: Path,
    out: Path,
    *flags: str,
    processes: int = 0,
    die: tuple[int, Sequence[Any]] | None = None,
    by_hand: bool = False,
) -> Forks:
    """The command line in a process of its own, or in several as the ranks of a distributed run, of which one may die."""
    command = ["pretrain", "--recipe", str(recipe), "--out", str(out), "-q", *flags]
    return Forks(command, out.with_name(f"{out.name}.log"), processes, die, by_hand=by_hand)


def start_torchrun(recipe: Path, out: Path, *flags: str, processes: int) -> subprocess.Popen[str]:
    """The same ranks under torchrun, which starts each as a new Python."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable,
        *ranks,
        "-m",
        "llamamoe_cli",
        "pretrain",
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        "-q",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *flags], env=environment, **pipes)
