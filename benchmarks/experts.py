"""Experts implementations of a converted FFN against the dense MLP of its parent and against each other, on CPU.

    python benchmarks/experts.py [--json PATH] [--threads N] [--seconds N] [--only WORD ...] [--ours]

Layers without router and shared neurons; the dense MLP has the neurons of all experts and the shared ones. ``train`` is
forward + backward from float32 weights, ``bf16`` under autocast; ``forward`` is without gradients, in the dtype named (T = 1
is decoding, more is prefill or decoding in a batch). Up to 64 tokens three layers run in turn, so that weights are not in
a cache. Routing is drawn anew for every run, with loads that spread by some tens of per cent: in bfloat16 every new number of
tokens of an expert costs time of its own, once, so runs on the same routing would be cheaper for all but the first. Who
goes first changes.

`ratio` is the median over turns of the time over the dense MLP's in that turn (less than 1 is faster), `low` and `high` are its
quartiles; `cpu_ratio` is the same of processor time, which other work on the machine disturbs less. `auto_over_best` is that of
``llamamoe_auto`` over the fastest of transformers' own implementations. `active_share` is that of the neurons that the
experts compute. What takes more than 1 s and 4 times the dense MLP in its first turn is measured once more and no longer;
what transformers refuses (rows that are not whole 16 bytes) is left out.

Results go into the file as they come: cases that stand there already are replaced, so the grid can be measured in parts.
``--table`` measures nothing and prints the ratios that stand there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from llamamoe.models.experts import register_experts

OURS = register_experts()
BUILT_IN = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Case:
    """One comparison. Sizes as everywhere: hidden, experts, width, selected, shared, tokens."""

    shape: str
    H: int
    N: int
    W: int
    k: int
    S: int
    T: int
    task: str
    dtype: str

    @property
    def label(self) -> str:
        """The name in the output, which ``--only`` matches."""
        return f"{self.task} {self.dtype} {self.shape} {self.N}x{self.W} k={self.k} T={self.T}"


SHAPES = (
    ("SmolLM2-135M", 576, 88, 16, 36, 128),
    ("SmolLM2-135M", 576, 64, 24, 24, 0),
    ("SmolLM2-135M", 576, 32, 48, 12, 0),
    ("SmolLM2-135M", 576, 16, 96, 6, 0),
    ("SmolLM2-135M", 576, 8, 192, 4, 0),
    ("SmolLM2-135M", 576, 8, 168, 3, 192),
    ("1B", 2048, 64, 112, 24, 1024),
    ("1B", 2048, 64, 128, 24, 0),
    ("1B", 2048, 32, 224, 12, 1024),
    ("1B", 2048, 16, 448, 6, 1024),
    ("1B", 2048, 8, 1024, 4, 0),
    ("1B", 2048, 8, 896, 3, 1024),
)
DEFAULT = SHAPES[6]


def tokens_of(shape: tuple[Any, ...], task: str) -> tuple[int, ...]:
    """Numbers of tokens; 2048 of the larger model take seconds a turn, so only the default shape has them."""
    many = (2048,) if shape[0] != "1B" or shape == DEFAULT else ()
    return (256, *many) if task == "train" else (1, 2, 4, 8, 16, 64, 256, *many)


def cases() -> Iterator[Case]:
    for task in ("forward", "train"):
        for shape in SHAPES:
            for dtype in ("bf16", "fp32"):
                for tokens in tokens_of(shape, task):
                    yield Case(*shape, tokens, task, dtype)


@lru_cache(maxsize=1)
def layers(
    hidden: int, num_experts: int, width: int, shared: int, dtype: torch.dtype, count: int
) -> tuple[MixtralConfig, list[MixtralExperts], list[LlamaMLP]]:
    """The experts, their configuration and their dense parents; kept for the next case."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=num_experts)
    dense = LlamaConfig(hidden_size=hidden, intermediate_size=num_experts * width + shared)
    experts = [MixtralExperts(config).to(dtype) for _ in range(count)]
    for module in experts:
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.02)
    return config, experts, [LlamaMLP(dense).to(dtype) for _ in range(count)]


class Bench:
    """The modules of a case and how one of them is run and timed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = torch.float32 if case.task == "train" or case.dtype == "fp32" else torch.bfloat16
        count = 3 if case.task == "forward" else 1
        self.config, self.experts, self.dense = layers(case.H, case.N, case.W, case.S, self.dtype, count)
        torch.manual_seed(0)
        used = count if case.T <= 64 else 1
        self.experts, self.dense = self.experts[:used], self.dense[:used]

    def implementations(self, *, ours: bool) -> list[str]:
        """The dense MLP first. ``batched_mm`` copies an expert's weights for every token: few tokens only."""
        batched = ["batched_mm"] if self.case.T <= 4 and self.case.task == "forward" else []
        return ["dense", "eager", "grouped_mm", *batched, *(OURS if ours else ["llamamoe_auto"])]

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, selected experts and their weights, drawn anew."""
        case = self.case
        x = torch.randn(case.T, case.H, dtype=self.dtype)
        popularity = 0.1 * torch.randn(case.N)
        indices = (torch.rand(case.T, case.N) + popularity).topk(case.k)[1]
        return x, indices, torch.rand(case.T, case.k, dtype=self.dtype)

    def run(self, name: str, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        """Wall and processor time of a layer in ms."""
        train, repeats = self.case.task == "train", 4 if self.case.T * self.case.H <= 1 << 14 else 1
        x, indices, weights = (t.clone() for t in inputs)
        if train:
            x.requires_grad_()
            weights.requires_grad_()
        self.config._experts_implementation = None if name == "dense" else name
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            for module in self.dense if name == "dense" else self.experts:
                with (
                    torch.set_grad_enabled(train),
                    torch.autocast("cpu", torch.bfloat16, enabled=train and self.case.dtype == "bf16"),
                ):
                    y = module(x) if name == "dense" else module(x, indices, weights)
                if train:
                    y.float().square().mean().backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for module in (*self.experts, *self.dense):
            module.zero_grad(set_to_none=True)
        return 1e3 * wall / repeats / len(self.dense), 1e3 * cpu / repeats / len(self.dense)

    def first(self, names: list[str]) -> dict[str, tuple[float, float]]:
        """A run of each that can run."""
        inputs, found = self.inputs(), {}
        for name in names:
            try:
                found[name] = self.run(name, inputs)
            except RuntimeError:
                if name not in BUILT_IN:
                    raise
        return found


def measure(case: Case, seconds: float, *, ours: bool, max_turns: int = 15) -> dict[str, Any]:
    """Turns until ``seconds`` are over, at least 3."""
    bench = Bench(case)
    first = bench.first(bench.implementations(ours=ours))
    slow = {name for name, (_, cpu) in first.items() if cpu > 1000 and cpu > 4 * first["dense"][1]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in first}
    started = time.perf_counter()
    for turn in range(max_turns):
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
        names = [name for name in times if name not in slow or turn == 0]
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(bench.run(name, bench.inputs()))
    result = {}
    for name, found in times.items():
        walls, cpus = ([mine[i] / dense[i] for mine, dense in zip(found, times["dense"], strict=False)] for i in (0, 1))
        low, _, high = quantiles(walls, n=4, method="inclusive") if len(walls) > 1 else walls * 3
        result[name] = {
            "ms": round(median(wall for wall, _ in found), 3),
            "ratio": round(median(walls), 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "cpu_ratio": round(median(cpus), 3),
            "turns": len(found),
        }
    best = min((name for name in BUILT_IN if name in result), key=lambda name: result[name]["ms"])
    pairs = zip(times["llamamoe_auto"], times[best], strict=False)
    return {
        "case": vars(case),
        "active_share": round(case.k * case.W / (case.N * case.W + case.S), 4),
        "best": best,
        "auto_over_best": round(median(mine[0] / theirs[0] for mine, theirs in pairs), 3),
        "results": result,
    }


def table(found: list[dict[str, Any]]) -> str:
    """Speed over the dense MLP's, ours and in brackets the best of transformers' own; a line per shape, dtype and task."""
    tokens = sorted({each["case"]["T"] for each in found})
    rows: dict[str, dict[int, str]] = {}
    for each in found:
        case, results = Case(**each["case"]), each["results"]
        theirs, mine = results[each["best"]]["ratio"], results["llamamoe_auto"]["ratio"]
        row = f"{case.task} {case.dtype} | {case.shape}, {case.k} of {case.N} x {case.W}{' + shared' if case.S else ''}"
        bold = "**" if each["auto_over_best"] > 1.05 else ""
        rows.setdefault(row, {})[case.T] = f"{bold}{1 / mine:.2f}{bold} ({1 / theirs:.2f})"
    lines = ["| task, dtype | experts | " + " | ".join(map(str, tokens)) + " |", "|---" * (2 + len(tokens)) + "|"]
    lines += [f"| {row} | {' | '.join(cells.get(T, '') for T in tokens)} |" for row, cells in rows.items()]
    over = sorted(each["auto_over_best"] for each in found)
    summary = (
        f"{len(over)} cases, time of llamamoe_auto over the best: median {median(over):.2f}, largest {over[-1]:.2f}, "
    )
    return "\n".join([*lines, "", summary + f"more than 1.05 in {sum(each > 1.05 for each in over)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/experts.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2, help="How long a case is repeated.")
    parser.add_argument("--only", nargs="*", default=[], help="Cases whose label holds all these words.")
    parser.add_argument("--ours", action="store_true", help="Measure all of ours, not only llamamoe_auto.")
    parser.add_argument("--table", action="store_true", help="Print what stands in the file.")
    options = parser.parse_args()
    kept = {}
    if options.json.exists():
        kept = {Case(**each["case"]): each for each in json.loads(options.json.read_text())["cases"]}
    if options.table:
        print(table(list(kept.values())))
        return
    torch.set_num_threads(options.threads)
    for case in cases():
        if all(word in case.label.split() for word in options.only):
            kept[case] = found = measure(case, options.seconds, ours=options.ours)
            row = {name: f"{each['ms']:g} ms x{each['ratio']:.2f}" for name, each in found["results"].items()}
            print(case.label, found["auto_over_best"], " ".join(f"{n}: {text};" for n, text in row.items()), flush=True)
            write(options.json, options.threads, [kept[case] for case in cases() if case in kept])


def write(path: Path, threads: int, found: list[dict[str, Any]]) -> None:
    """The file as it is after a case."""
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    result = {"threads": threads, "cores": os.cpu_count(), "omp_wait_policy": policy, **versions, "cases": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
