"""Decoding at batch 1 on a CPU: a 1B-shaped model of 8 experts beside its dense parent, weights far beyond the caches.

    python benchmarks/decoding.py --work FOLDER [--dtypes bfloat16 float32] [--json FILE]

FFN block: 16 layers of Mixtral's block (router included) and 16 dense MLPs, each run in turn on one token, so that no
weight is still in a cache when it is read again; median over turns of the ratio within a turn. Whole model: `llamamoe.bench`
on checkpoints of random weights. What weights let expect is the bytes that one token reads, dense over converted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from synthetic import LLAMA_2_7B, make
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import llamamoe
from llamamoe.models.experts import register_experts

SHAPE = {
    **LLAMA_2_7B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
}
NUM_EXPERTS, TOP_K = 8, (4, 2)
IMPLEMENTATIONS = ("llamamoe_auto", "grouped_mm", "eager")
LIMIT = 0.7


def ffn_blocks(top_k: int, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """Time of all layers' FFNs for one token, dense and converted."""
    hidden, width, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    dense_config = LlamaConfig(hidden_size=hidden, intermediate_size=width)
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=width // NUM_EXPERTS,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
    )
    dense = [LlamaMLP(dense_config).to(dtype) for _ in range(layers)]
    sparse = [MixtralSparseMoeBlock(config).to(dtype) for _ in range(layers)]
    for block in sparse:
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.02)

    def run(name: str) -> float:
        config._experts_implementation = None if name == "dense" else name
        x = torch.randn(1, 1, hidden, dtype=dtype)
        started = time.perf_counter()
        with torch.no_grad():
            for block in dense if name == "dense" else sparse:
                block(x)
        return time.perf_counter() - started

    names = ["dense", *IMPLEMENTATIONS]
    for name in names:
        run(name)
    found = [{name: run(name) for name in (names if turn % 2 else names[::-1])} for turn in range(turns)]
    ratio = NUM_EXPERTS / (top_k + NUM_EXPERTS / (3 * width))  # the router is read, too
    return {
        "dense_ms_per_layer": 1e3 * median(each["dense"] for each in found) / layers,
        "bytes_dense_over_active": ratio,
        "limit": LIMIT * ratio,
        "speed_up": {name: median(each["dense"] / each[name] for each in found) for name in IMPLEMENTATIONS},
    }


def models(work: Path) -> dict[str, Path]:
    """The checkpoints, made once."""
    from llamamoe.checkpoint.gguf.reader import GgufCheckpoint
    from llamamoe.studies.demo_material import model_file

    places = {"dense": work / "dense"} | {f"{k} of {NUM_EXPERTS}": work / f"moe-{k}" for k in TOP_K}
    if not places["dense"].exists():
        make(places["dense"], SHAPE, num_shards=1)
        GgufCheckpoint(model_file()).save_tokenizer(places["dense"])
    for top_k in TOP_K:
        out = places[f"{top_k} of {NUM_EXPERTS}"]
        if not out.exists():
            given = {"num_experts": NUM_EXPERTS, "top_k": top_k, "method": "random", "target": "mixtral"}
            llamamoe.split(places["dense"], out, llamamoe.load_recipe(given=given), verify=False)
    return places


def whole_model(dense: Path, moe: Path, dtype: str) -> dict[str, Any]:
    """Decoding speed of the model beside its parent's."""
    found = llamamoe.bench(
        moe, against=dense, batch_sizes=[1], prompt_tokens=32, new_tokens=32, repeats=5, dtype=dtype,
        experts_implementation="llamamoe_auto",
    )  # fmt: skip
    assert found.against is not None
    mine, parent = found.model, found.against
    ratio = parent.active_bytes / mine.active_bytes
    return {
        "dense_tokens_per_second": parent.speeds[0].decode_tokens_per_second,
        "tokens_per_second": mine.speeds[0].decode_tokens_per_second,
        "speed_up": parent.speeds[0].decode_seconds / mine.speeds[0].decode_seconds,
        "bytes_dense_over_active": ratio,
        "limit": max(1.0, LIMIT * ratio),
        "spread": [parent.speeds[0].spread, mine.speeds[0].spread],
        "drift": found.drift,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/decoding"))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register_experts()
    options.work.mkdir(parents=True, exist_ok=True)
    places, rows = models(options.work), []
    for dtype in options.dtypes:
        for top_k in TOP_K:
            name = f"{top_k} of {NUM_EXPERTS}"
            row = {"experts": name, "dtype": dtype, "ffn": ffn_blocks(top_k, getattr(torch, dtype), options.turns)}
            row["model"] = whole_model(places["dense"], places[name], dtype)
            rows.append(row)
            print(json.dumps(row), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {"threads": options.threads, "cores": os.cpu_count(), **versions, "rows": rows}
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
