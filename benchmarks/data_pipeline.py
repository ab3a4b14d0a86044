"""Speed of tokenising on one core, and of drawing and reading batches of tokens.

    python benchmarks/data_pipeline.py --tokenizer MODEL --text slimpajama/train --work /big/disk [--json FILE]

Everything is timed in processor seconds of this process, so that other work on the machine counts little; reading is warm
(the files are in memory after the first round).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from llamamoe.data.recipe import load_tokenize_recipe
from llamamoe.data.shards import TokenCorpus
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", required=True, action="append")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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
