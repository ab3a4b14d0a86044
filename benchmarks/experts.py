"""Experts implementations of a converted FFN against the dense MLP of its parent, on CPU.

    python benchmarks/experts.py [--json PATH] [--threads N] [--seconds N] [--only WORD ...]

One layer without router and shared neurons; the dense MLP has the neurons of all experts and the shared ones. ``train`` is
forward + backward from float32 weights, ``bf16`` under autocast; ``forward`` is without gradients, in the dtype named (T = 1
is decoding, more is prefill). Routing is drawn anew in every turn, with loads that spread by some tens of per cent, because
in bfloat16 every new number of tokens of an expert may cost time of its own. Inputs are the same for all in a turn, who goes
first changes, and `ratio` is the median over turns of the time over the dense MLP's in that turn (less than 1 is faster).
`cpu_ratio` is the same of processor time, which other work on the machine disturbs less; `active_share`
is that of the neurons that the experts compute. What takes more than 1 s and 4
times the dense MLP in its first turn is measured once more and no longer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from llamamoe.models.experts import register_experts

OURS = register_experts()


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
        """What is printed, and what ``--only`` looks into."""
        return f"{self.task} {self.dtype} {self.shape} {self.N}x{self.W} k={self.k} T={self.T}"


SHAPES = (
    ("SmolLM2-135M", 576, 88, 16, 36, 128),
    ("SmolLM2-135M", 576, 8, 192, 4, 0),
    ("1B", 2048, 8, 1024, 2, 0),
    ("1B", 2048, 8, 1024, 4, 0),
)


TOKENS = {
    ("SmolLM2-135M", "train"): (2048, 512),
    ("SmolLM2-135M", "forward"): (1, 16, 512, 2048),
    ("1B", "train"): (256,),  # more would take half a minute a turn
    ("1B", "forward"): (1, 16, 512),
}


def cases() -> Iterator[Case]:
    for task in ("train", "forward"):
        for shape in SHAPES:
            for dtype in ("bf16", "fp32"):
                for tokens in TOKENS[shape[0], task]:
                    yield Case(*shape, tokens, task, dtype)


class Bench:
    """The modules of a case and how one of them is run and timed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.dtype = torch.float32 if case.task == "train" or case.dtype == "fp32" else torch.bfloat16
        sizes = {"hidden_size": case.H, "intermediate_size": case.W}
        self.config = MixtralConfig(**sizes, num_local_experts=case.N, num_experts_per_tok=case.k)
        self.experts = MixtralExperts(self.config).to(self.dtype)
        for weight in self.experts.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        neurons = case.N * case.W + case.S
        self.dense = LlamaMLP(LlamaConfig(hidden_size=case.H, intermediate_size=neurons)).to(self.dtype)

    def implementations(self) -> list[str]:
        """The dense MLP first."""
        found = ["dense", "eager", "grouped_mm", *OURS]
        return [*found, "batched_mm"] if self.case.T == 1 else found

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, selected experts and their weights, drawn anew."""
        case = self.case
        x = torch.randn(case.T, case.H, dtype=self.dtype)
        popularity = 0.1 * torch.randn(case.N)
        indices = (torch.rand(case.T, case.N) + popularity).topk(case.k)[1]
        return x, indices, torch.rand(case.T, case.k, dtype=self.dtype)

    def run(self, name: str, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        """Wall and processor time in ms."""
        train, repeats = self.case.task == "train", 20 if self.case.T == 1 else 1
        x, indices, weights = (t.clone() for t in inputs)
        if train:
            x.requires_grad_()
            weights.requires_grad_()
        if name != "dense":
            self.config._experts_implementation = name
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            with (
                torch.set_grad_enabled(train),
                torch.autocast("cpu", torch.bfloat16, enabled=train and self.case.dtype == "bf16"),
            ):
                y = self.dense(x) if name == "dense" else self.experts(x, indices, weights)
            if train:
                y.float().square().mean().backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.experts.zero_grad(set_to_none=True)
        self.dense.zero_grad(set_to_none=True)
        return 1e3 * wall / repeats, 1e3 * cpu / repeats


def measure(case: Case, seconds: float, max_turns: int = 15) -> dict[str, Any]:
    """Turns until ``seconds`` are over, at least 3."""
    bench = Bench(case)
    inputs = bench.inputs()
    first = {name: bench.run(name, inputs) for name in bench.implementations()}
    slow = {name for name, (_, cpu) in first.items() if cpu > 1000 and cpu > 4 * first["dense"][1]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in first}
    started = time.perf_counter()
    for turn in range(max_turns):
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
        inputs = bench.inputs()
        names = [name for name in times if name not in slow or turn == 0]
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(bench.run(name, inputs))
    result = {}
    for name, found in times.items():
        pairs = list(zip(found, times["dense"], strict=False))  # a slow one has the first turn only
        result[name] = {
            "ms": round(median(wall for wall, _ in found), 3),
            "ratio": round(median(mine[0] / dense[0] for mine, dense in pairs), 3),
            "cpu_ratio": round(median(mine[1] / dense[1] for mine, dense in pairs), 3),
            "turns": len(found),
        }
    return {
        "case": vars(case),
        "active_share": round(case.k * case.W / (case.N * case.W + case.S), 4),
        "results": result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/experts.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="How long a case is repeated.")
    parser.add_argument(
        "--only", nargs="*", default=[], help="Cases whose label holds all these words; nothing is written."
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for case in cases():
        if all(word in case.label.split() for word in options.only):
            found.append(measure(case, options.seconds))
            row = {name: f"{each['ms']:g} ms x{each['ratio']:.2f}" for name, each in found[-1]["results"].items()}
            print(case.label, " ".join(f"{name}: {text};" for name, text in row.items()), flush=True)
    if not options.only:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        result = {"threads": options.threads, "cores": os.cpu_count(), **versions, "cases": found}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
