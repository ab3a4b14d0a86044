"""Speed of tokenising on one core, and of drawing and reading batches of tokens.

    python benchmarks/data_pipeline.py --tokenizer MODEL --text slimpajama/train --work /big/disk [--json FILE]

Everything is timed in processor seconds of this process, so that other work on the machine counts little; reading is warm
(the files are in memory after the first round). With ``--engines ROUNDS`` the two ways to tokenise in parallel are compared
instead, in turns: `llamamoe.tokenize`, and the same units on datatrove's local executor (wall seconds of fresh processes,
with 1 and 2 workers; and what is left and done again after the first process was killed half-way).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from llamamoe.checkpoint.manifest import file_sha256
from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.data.shards import TokenCorpus
from llamamoe.data.token_plan import plan_tokenize
from llamamoe.data.tokenize import tokenize
from llamamoe.training.mixtures.sampler import MixtureSampler
from llamamoe.training.mixtures.weights import mixture_weights

SHAPES = ((8, 512), (64, 2048), (256, 4096))
"""Sequences of a batch, tokens of a sequence."""


def tokenise(tokenizer: str, text: list[str], work: Path) -> dict[str, float]:
    """Tokenise all text in this process."""
    shutil.rmtree(work / "tokens", ignore_errors=True)
    recipe = load_tokenize_recipe(given={"tokenizer": tokenizer, "text": text, "workers": 1, "shard_tokens": 2**21})
    started = 0.0

    def begin_after_the_first(_: object) -> None:  # imports and the tokenizer's own caches are not counted
        nonlocal started, first
        if not started:
            started, first = time.process_time(), _

    first: object = None
    found = tokenize(recipe, work / "tokens", force=True, progress=begin_after_the_first)
    seconds = time.process_time() - started
    entries = found.index.splits["train"].values()
    share = 1 - first.done / first.total  # type: ignore[attr-defined]
    tokens, nbytes = sum(e.tokens for e in entries), sum(e.text_bytes for e in entries)
    return {
        "tokens": tokens,
        "bytes_per_token": nbytes / tokens,
        "text_bytes_per_second": share * nbytes / seconds,
        "tokens_per_second": share * tokens / seconds,
    }


def read(folder: Path, batch_size: int, length: int, seconds: float = 3.0) -> dict[str, float]:
    """Draw batches by Sheared-LLaMA's weights (uniform where there are other domains) and read them."""
    corpus = TokenCorpus(folder)
    blocks = {name: corpus.num_blocks(name, length) for name in corpus.domains}
    known = mixture_weights("sheared_llama" if "c4" in blocks else "uniform", blocks)
    usable = {name: weight for name, weight in known.items() if blocks[name]}
    sampler = MixtureSampler(blocks, usable, batch_size, seed=0)
    for step in range(200):  # warm
        corpus.gather(*sampler.batch(step), length)
    step, began = 200, time.process_time()
    while time.process_time() - began < seconds:
        corpus.gather(*sampler.batch(step), length)
        step += 1
    rate = (step - 200) * batch_size * length / (time.process_time() - began)
    began, drawn = time.process_time(), 500
    for later in range(step, step + drawn):
        sampler.batch(later)
    drawing = (time.process_time() - began) / drawn
    return {"batch_size": batch_size, "length": length, "tokens_per_second": rate, "draw_seconds": drawing}


def seek(steps: int = 10**6) -> float:
    """Seconds to find where a run stands after many steps, from its log of weights alone."""
    names = [f"domain {i}" for i in range(7)]
    sampler = MixtureSampler(dict.fromkeys(names, 10**6), dict.fromkeys(names, 1.0), 256, seed=0)
    began = time.process_time()
    sampler.consumed(steps)
    return time.process_time() - began


def run_engine(name: str, recipe: Path, out: Path, workers: int, tasks: int) -> None:
    """Tokenise by one engine, going on with what a killed run left; for a process of its own."""
    if name == "pool":
        tokenize(load_tokenize_recipe(recipe, given={"workers": workers}), out, resume=True)
        return
    from datatrove.executor.local import LocalPipelineExecutor

    from llamamoe.data.datatrove_pipeline import MergeIndex, TokenizeFiles

    loaded, logs = load_tokenize_recipe(recipe), out.with_name(out.name + ".logs")
    files = LocalPipelineExecutor(
        [TokenizeFiles(loaded, out)], tasks=tasks, workers=workers, logging_dir=str(logs / "files")
    )
    LocalPipelineExecutor([MergeIndex(loaded, out)], depends=files, logging_dir=str(logs / "merge")).run()


def start_engine(name: str, work: Path, workers: int, tasks: int) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `run_engine` in a session of its own; its words go to a file."""
    out = work / f"{name}.{workers}"
    job = {"name": name, "recipe": str(work / "recipe.yaml"), "out": str(out), "workers": workers, "tasks": tasks}
    log = (work / "log.txt").open("ab")
    command = [sys.executable, __file__, "--run-engine", json.dumps(job)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True), out


def finish_engine(name: str, work: Path, workers: int, tasks: int) -> float:
    """Wall seconds of an engine, the start of its processes included."""
    began = time.monotonic()
    process, _ = start_engine(name, work, workers, tasks)
    if process.wait():
        raise RuntimeError((work / "log.txt").read_text()[-2000:])
    return time.monotonic() - began


def kill_engine(name: str, work: Path, workers: int, tasks: int, units: int) -> dict[str, float]:
    """Kill the first process of an engine when half of the units are there, and finish what it left."""
    process, out = start_engine(name, work, workers, tasks)
    units_there = out.with_name(out.name + ".partial") / "work"
    while process.poll() is None and len(finished_units(units_there)) < units // 2:
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    before = finished_units(units_there)
    for each in left:
        each.kill()
    psutil.wait_procs(left)
    seconds = finish_engine(name, work, workers, tasks)
    return {"finished": len(before), "processes_left_after_5_s": len(left), "seconds_of_the_rest": seconds}


def finished_units(folder: Path) -> set[str]:
    """The folders of whole units."""
    return {path.name for path in folder.iterdir() if "." not in path.name} if folder.exists() else set()


def compare_engines(tokenizer: str, text: list[str], work: Path, rounds: int) -> dict[str, object]:
    """Both engines in turns, and what they make of a kill; their results must be the same bytes."""
    work.mkdir(parents=True, exist_ok=True)
    recipe = load_tokenize_recipe(given={"tokenizer": tokenizer, "text": text})
    (work / "recipe.yaml").write_text(recipe.to_yaml())
    units = len(plan_tokenize(recipe).units)
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds):
        for workers in (1, 2):
            ways = [("pool", workers, 0), ("datatrove", workers, workers), ("datatrove", workers, units)]
            for name, count, tasks in ways if turn % 2 == 0 else reversed(ways):
                remove(work, name, count)
                key = f"{name}, {count} workers" + (f", {tasks} tasks" if tasks else "")
                seconds.setdefault(key, []).append(finish_engine(name, work, count, tasks))
                print(f"{key}: {seconds[key][-1]:.1f} s", flush=True)
            same = [digests(work / f"{name}.{workers}") for name in ("pool", "datatrove")]
            if same[0] != same[1]:
                raise RuntimeError("the two engines made different bytes")
    kills = {}
    for name in ("pool", "datatrove"):
        remove(work, name, 2)
        kills[name] = kill_engine(name, work, 2, units, units)
        kills[name]["same_bytes"] = digests(work / f"{name}.2") == digests(work / "pool.1")
        print(name, "killed:", kills[name], flush=True)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for key, value in medians.items():
        print(f"{key}: median {value:.1f} s, {value / medians['pool, 1 workers']:.2f} of the pool with one worker")
    return {"units": units, "seconds": seconds, "kills": kills}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a result but its recipe."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def remove(work: Path, name: str, workers: int) -> None:
    """Make room for another run."""
    for ending in ("", ".partial", ".logs"):
        shutil.rmtree(work / f"{name}.{workers}{ending}", ignore_errors=True)


def main() -> None:
    if sys.argv[1:2] == ["--run-engine"]:
        job = json.loads(sys.argv[2])
        run_engine(job["name"], Path(job["recipe"]), Path(job["out"]), job["workers"], job["tasks"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", required=True, action="append")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engines", type=int, metavar="ROUNDS", help="compare the two engines instead")
    args = parser.parse_args()
    if args.engines:
        compared = compare_engines(args.tokenizer, args.text, args.work, args.engines)
        if args.json:
            args.json.write_text(json.dumps(compared, indent=1) + "\n")
        return
    found = {"tokenise": tokenise(args.tokenizer, args.text, args.work)}
    rate = found["tokenise"]
    print(f"tokenise, one core: {rate['tokens_per_second'] / 1e6:.2f} M tokens/s, "
          f"{rate['text_bytes_per_second'] / 1e6:.2f} MB/s of text, {rate['bytes_per_token']:.2f} bytes a token")  # fmt: skip
    rows = [read(args.work / "tokens", *shape) for shape in SHAPES]
    for row in rows:
        print(f"batches of {row['batch_size']} x {row['length']}: {row['tokens_per_second'] / 1e6:.0f} M tokens/s, "
              f"{1e6 * row['draw_seconds']:.0f} us of a step to draw it")  # fmt: skip
    seconds = seek()
    print(f"seek to step 1,000,000 from the log: {seconds:.2f} s")
    if args.json:
        args.json.write_text(
            json.dumps({**found, "read": rows, "seek_million_steps_seconds": seconds}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
