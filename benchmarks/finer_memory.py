"""Peak memory of ``llamamoe resplit --top-k`` on a random wide mixture, beside the plan's estimate.

    python -m benchmarks.finer_memory --work /big/disk [--experts 32] [--width 384] [--most 32768 4096]

``--most`` are values of `MOST_PLACES` of the repair ``least_squares``, the number of neurons that it solves for together. The peak is
that of torch's allocator (`benchmarks.meters`).
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import llamamoe
from benchmarks.meters import CpuMeter
from llamamoe.methods.repairs import least_squares
from tests.dense import make_tokenizer

VOCABULARY = 128


def make_wide(folder: Path, experts: int, width: int, hidden: int) -> Path:
    """Write a random Qwen3-MoE of one layer, with a tokenizer of letters."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=2, max_position_embeddings=256,
        intermediate_size=width, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def write_text(path: Path, letters: int) -> Path:
    """Write random letters, each of which is a token."""
    path.write_text("".join(random.Random(0).choices("abcdefgh ", k=letters)))
    return path


class Peak(NamedTuple):
    """Bytes, and the error of the first layer after the repair."""

    measured: int
    planned: int
    error: float


def peak(model: Path, text: Path, out: Path, tokens: int, repair: str) -> Peak:
    """Split the mixture's experts into four pieces, of which four are selected."""
    keys = {"top_k": 4, "calibration": [str(text)], "calibration_tokens": tokens, "repair": repair, "method": "kmeans"}
    planned = llamamoe.resplit(model, None, 4, dry_run=True, **keys).calibration
    assert planned is not None
    with CpuMeter() as meter:
        meter.begin()
        found = llamamoe.resplit(model, out, 4, **keys)
        meter.mark()
    shutil.rmtree(out)
    return Peak(meter.peak, planned.peak_bytes, found.receipt["layers"][0]["output_error"])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/work"), help="A folder with room for the mixture."
    )
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--most", type=int, nargs="*", default=[32768, 4096])
    parser.add_argument("--repair", default="least_squares")
    options = parser.parse_args()
    work = options.work / "finer-memory"
    model = make_wide(work / "model", options.experts, options.width, options.hidden)
    text = write_text(work / "text.txt", 2 * options.tokens)
    for most in options.most:
        least_squares.MOST_PLACES = most
        found = peak(model, text, work / "out", options.tokens, options.repair)
        print(
            f"{options.experts * options.width:,} neurons, {most:,} at once: peak {found.measured / 1e6:.0f} MB, planned {found.planned / 1e6:.0f} MB, "
            f"layer error {found.error:.4f}",
            flush=True,
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
