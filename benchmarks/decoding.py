"""One token at a time, and a prompt, on a CPU: a 1B-shaped model beside its dense parent, weights far beyond the caches.

    python benchmarks/decoding.py --work FOLDER [--dtypes bfloat16 float32] [--only WORD ...] [--json FILE]

FFN block: the MoE blocks of all layers (router and shared expert included) and the dense MLPs, each run in turn on one token,
so that no weight is still in a cache when it is read again; median over turns of the ratio within a turn. Whole model:
`llamamoe.bench` on checkpoints of random weights, a prompt of 256 tokens. What weights let expect is the bytes that one token
reads, dense over converted. Rows that stand in the file already are replaced, so it can be measured in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from synthetic import LLAMA_2_7B, make
from transformers import LlamaConfig, Qwen2MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import llamamoe
from llamamoe.models.experts import register_experts

SHAPE = {
    **LLAMA_2_7B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
}
IMPLEMENTATIONS = ("llamamoe_auto", "grouped_mm", "eager")
LIMIT = 0.7


@dataclass(frozen=True)
class Split:
    """A division of the FFN into experts and shared neurons."""

    num_experts: int
    top_k: int
    shared: float = 0.0
    target: str = "mixtral"

    @property
    def name(self) -> str:
        """As a reader would say it."""
        return f"{self.top_k} of {self.num_experts}" + (", an eighth shared" if self.shared else "")


SPLITS = (
    Split(64, 24, 0.125, "qwen2_moe"),
    Split(8, 3, 0.125, "qwen2_moe"),
    Split(8, 4),
    Split(8, 2),
)


def ffn_blocks(split: Split, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """Time of all layers' FFNs for one token, dense and converted."""
    hidden, neurons, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    dense_config = LlamaConfig(hidden_size=hidden, intermediate_size=neurons)
    shared = int(neurons * split.shared)
    width = (neurons - shared) // split.num_experts
    config = Qwen2MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared,
        num_experts=split.num_experts,
        num_experts_per_tok=split.top_k,
    )
    dense = [LlamaMLP(dense_config).to(dtype) for _ in range(layers)]
    sparse = [Qwen2MoeSparseMoeBlock(config).to(dtype) for _ in range(layers)]
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
    router = split.num_experts / 3  # rows of a neuron's size that are read, too
    ratio = neurons / (split.top_k * width + shared + router)
    speed_ups = {name: [each["dense"] / each[name] for each in found] for name in IMPLEMENTATIONS}
    return {
        "dense_ms_per_layer": 1e3 * median(each["dense"] for each in found) / layers,
        "bytes_dense_over_active": ratio,
        "limit": LIMIT * ratio,
        "speed_up": {name: median(values) for name, values in speed_ups.items()},
        "quartiles": {name: quantiles(values, n=4)[::2] for name, values in speed_ups.items()},
    }


def models(work: Path, splits: list[Split]) -> dict[str, Path]:
    """The checkpoints, made once."""
    from llamamoe.checkpoint.gguf.reader import GgufCheckpoint
    from llamamoe.studies.demo_material import model_file

    places = {"dense": work / "dense"}
    if not places["dense"].exists():
        make(places["dense"], SHAPE, num_shards=1)
        GgufCheckpoint(model_file()).save_tokenizer(places["dense"])
    for split in splits:
        places[split.name] = out = work / f"{split.target}-{split.num_experts}-{split.top_k}"
        if not out.exists():
            given: dict[str, Any] = {"num_experts": split.num_experts, "top_k": split.top_k, "method": "random"}
            given |= {"target": split.target} | ({"shared": split.shared} if split.shared else {})
            llamamoe.split(places["dense"], out, llamamoe.load_recipe(given=given), verify=False)
    return places


def whole_model(dense: Path, moe: Path, dtype: str, implementation: str | None) -> dict[str, Any]:
    """Speed of the model beside its parent's."""
    found = llamamoe.bench(
        moe, against=dense, batch_sizes=[1, 8], prompt_tokens=256, new_tokens=16, repeats=2, dtype=dtype,
        experts_implementation=implementation,
    )  # fmt: skip
    assert found.against is not None
    mine, parent = found.model, found.against
    ratio = parent.active_bytes / mine.active_bytes
    return {
        "implementation": mine.experts_implementation,
        "dense_tokens_per_second": parent.speeds[0].decode_tokens_per_second,
        "tokens_per_second": mine.speeds[0].decode_tokens_per_second,
        "speed_up": parent.speeds[0].decode_seconds / mine.speeds[0].decode_seconds,
        "speed_up_batch_8": parent.speeds[1].decode_seconds / mine.speeds[1].decode_seconds,
        "prefill_speed_up": parent.speeds[0].prefill_seconds / mine.speeds[0].prefill_seconds,
        "prefill_speed_up_batch_8": parent.speeds[1].prefill_seconds / mine.speeds[1].prefill_seconds,
        "bytes_dense_over_active": ratio,
        "limit": max(1.0, LIMIT * ratio),
        "spread": [parent.speeds[0].spread, mine.speeds[0].spread],
        "drift": found.drift,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/decoding"))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="*", default=[], help="Splits whose name holds all these words.")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", action="store_true", help="Make the checkpoints and measure nothing.")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register_experts()
    options.work.mkdir(parents=True, exist_ok=True)
    splits = [each for each in SPLITS if all(word in each.name for word in options.only)]
    places = models(options.work, splits)
    if options.make:
        return
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if options.json.exists():
        rows = {(each["experts"], each["dtype"]): each for each in json.loads(options.json.read_text())["rows"]}
    for dtype in options.dtypes:
        for split in splits:
            row: dict[str, Any] = {"experts": split.name, "dtype": dtype}
            row["ffn"] = ffn_blocks(split, getattr(torch, dtype), options.turns)
            for key, implementation in (("model", "llamamoe_auto"), ("model_as_transformers_chooses", None)):
                row[key] = whole_model(places["dense"], places[split.name], dtype, implementation)
                rows[split.name, dtype] = row
                write(options.json, options.threads, list(rows.values()))
            print(json.dumps(row), flush=True)


def write(path: Path, threads: int, rows: list[dict[str, Any]]) -> None:
    """The file as it is after a row."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    result = {"threads": threads, "cores": os.cpu_count(), "omp_wait_policy": policy, **versions, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
