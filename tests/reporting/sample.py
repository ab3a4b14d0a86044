"""A made-up report: what the collector would hand to the page, with hostile names, and the same at every call."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

DOMAINS = ("arxiv", "book", "c4", "code", "wikipedia & <b>co</b>", "stackexchange", "法律 $x_1$")
HOSTILE = "</script><script>window.broken = true</script>"
TEXT = (
    "The", " router", " chooses", " a", " few", " experts", " for", " every", " token", ",", " and", " the", " others",
    " rest", ".", "\n", " In", " shallow", " layers", " choice", " follows", " form", ":", " spaces", ",", " brackets",
    " (", "x", ")", " &", " numbers", " 1", "2", "8", ".", " Deeper", " down", " it", " follows", " meaning", "\t",
    "naïve", " 模型", " مرحبا", HOSTILE, "\x00",
)  # fmt: skip
PARTS = {  # share of the dense model's parameters
    "embedding": 0.21, "attention": 0.2, "router": 0.0, "routed": 0.0, "shared": 0.0, "stub": 0.0, "dense_ffn": 0.58,
    "norm": 0.001, "head": 0.009,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Sizes of the made-up models."""

    layers: int = 6
    experts: int = 8
    top_k: int = 3
    domains: int = 3
    tokens: int = 40
    models: int = 2
    runs: int = 2


SMOLLM = Size(layers=30, experts=88, top_k=36, domains=7, tokens=250)


def report(size: Size = Size(), *, parent: bool = True, bits_per_byte: bool = False) -> dict[str, Any]:
    """A whole report of that size."""
    dice = random.Random(0)
    domains = list(DOMAINS[: size.domains]) + [f"domain {i}" for i in range(len(DOMAINS), size.domains)]
    names = ["smollm2-moe", "smollm2-moe-healed", "smollm2-moe-sft", "a/very-long-name-of-a-model-" + "x" * 60]
    dense = _model(dice, size, domains, "HuggingFaceTB/SmolLM2-135M", 0, parent, bits_per_byte)
    return {
        "llamamoe": "0.1.0",
        "protocol": "Perplexity over windows of 2048 tokens that do not overlap; every token but a window's first counts.",
        "context_length": 2048,
        "max_tokens": 8192,
        "domains": domains,
        "command": "llamamoe report smollm2-moe --against HuggingFaceTB/SmolLM2-135M --text text --out report.html",
        "run": {"seconds": 431.0, "device": "cpu", "finished": "2026-11-25T08:00:00Z"},
        "parent": dense if parent else None,
        "models": [
            _model(dice, size, domains, names[i], i + 1, parent, bits_per_byte) for i in range(size.models)
        ],
        "training": [_run(dice, domains, f"run-{i}", 0.3 * i) for i in range(size.runs)],
        "notes": ["The tokenizers differ: only bits per byte compare."] if bits_per_byte else [],
    }  # fmt: skip


def _model(
    dice: random.Random, size: Size, domains: list[str], name: str, place: int, parent: bool, bits_per_byte: bool
) -> dict[str, Any]:
    worse = 0.0 if place == 0 else 0.42 / place
    losses = {domain: 2.4 + 0.13 * i + worse * (0.8 + 0.1 * i) for i, domain in enumerate(domains)}
    mean = sum(losses.values()) / len(losses)
    gap: dict[str, dict[str, Any]] = {
        d: {"loss": worse * (0.8 + 0.1 * i), "loss_stderr": 0.008 + 0.002 * i} for i, d in enumerate(domains)
    }
    for each in gap.values():
        each |= {"bits_per_byte": each["loss"] / 3.0, "bits_per_byte_stderr": each["loss_stderr"] / 3.0}
    total: dict[str, Any] = {
        "loss": worse * 1.1,
        "loss_stderr": 0.006,
        "bits_per_byte": worse / 2.9,
        "bits_per_byte_stderr": 0.002,
    }
    for each in (*gap.values(), total):
        for what in ("loss", "bits_per_byte"):
            half = 2.1 * each[f"{what}_stderr"]
            each[f"{what}_interval"] = [each[what] - half, each[what] + half]
    return {
        "name": name,
        "dtype": "bfloat16",
        "comparable": "bits_per_byte" if bits_per_byte else "perplexity",
        "scores": {
            "domains": {domain: _score(loss) for domain, loss in losses.items()},
            "overall": _score(mean - 0.02),
            "mean_over_domains": _score(mean),
        },
        "difference": {"domains": gap, "overall": total, "mean_over_domains": total} if parent and place else None,
        "cost": _cost(size, dense=place == 0),
        "target": "mixtral" if place else None,
        "llama_cpp": True,
        "experts": None if place == 0 else {
            "num_experts": size.experts, "top_k": size.top_k, "expert_width": 16, "shared_width": 128,
            "moe_layers": list(range(1, size.layers)), "dense_layers": [0],
        },
        "routing": None if place == 0 else _routing(dice, size, domains, place),
        "provenance": {
            "block": {"method": "token_clusters", "seed": 0, "parent_sha256": "ab" * 32} if place else None,
            "recipe": "num_experts: 88\ntop_k: 36\nmethod: token_clusters\n" if place else None,
            "weights_sha256": "0123456789abcdef" * 4,
            "versions": {"llamamoe": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"} if place else None,
            "commands": ["llamamoe split dense my-moe --calibration text"] if place else [],
            "derived": ["healed from smollm2-moe"] if place > 1 else [],
            "calibration_tokens": 8192 if place else None,
            "trained": place > 1,
        },
    }  # fmt: skip


def _score(loss: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "loss_stderr": 0.03,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 4.3,
        "bits_per_byte_stderr": 0.01,
        "tokens": 8192,
    }


def _cost(size: Size, dense: bool) -> dict[str, Any]:
    whole = 134_515_008
    parts = {name: {"total": int(whole * share), "active": int(whole * share)} for name, share in PARTS.items()}
    if not dense:
        ffn = parts["dense_ffn"]["total"]
        first = ffn // size.layers
        shared = (ffn - first) // 12
        routed = ffn - first - shared
        parts |= {
            "dense_ffn": {"total": first, "active": first},
            "shared": {"total": shared, "active": shared},
            "routed": {"total": routed, "active": routed * size.top_k // size.experts},
            "router": {"total": 1_470_000, "active": 1_470_000},
        }
    total, active = (sum(part[kind] for part in parts.values()) for kind in ("total", "active"))
    return {
        "total_parameters": total, "active_parameters": active, "flops_per_token": 2 * active, "bytes": 2 * total,
        "parts": parts,
    }  # fmt: skip


def _routing(dice: random.Random, size: Size, domains: list[str], place: int) -> dict[str, Any]:
    layers = range(1, size.layers)
    return {
        "tokens": 8192 * len(domains),
        "layers": [_layer(dice, size, domains, layer, place) for layer in layers],
        "passages": [_passage(dice, size, domain) for domain in domains],
        "top_tokens": [
            [
                [[dice.choice(TEXT), dice.randint(3, 60), round(dice.uniform(0.1, 1), 4)] for _ in range(dice.randint(0, 6))]
                for _ in range(size.experts)
            ]
            for _ in layers
        ],
    }  # fmt: skip


def _passage(dice: random.Random, size: Size, domain: str) -> dict[str, Any]:
    return {
        "domain": domain,
        "tokens": [TEXT[i % len(TEXT)] for i in range(size.tokens)],
        "first_expert": [
            [min(int(dice.expovariate(6 / size.experts)), size.experts - 1) for _ in range(size.tokens)]
            for _ in range(1, size.layers)
        ],
    }


def _layer(dice: random.Random, size: Size, domains: list[str], layer: int, place: int) -> dict[str, Any]:
    depth = layer / size.layers
    loads = {d: _load(dice, size, spread=0.15 + 0.5 * depth) for d in domains}
    load = [sum(each) / len(domains) for each in zip(*loads.values(), strict=True)]
    if layer == 2 and place == 1:  # a dead expert
        loads = {d: [0.0, *(x / (1 - each[0]) for x in each[1:])] for d, each in loads.items()}
        load = [0.0, *(x / (1 - load[0]) for x in load[1:])]
    entropy = -sum(x * math.log(x) for x in load if x) / math.log(size.experts)
    share = size.top_k / size.experts
    return {
        "layer": layer,
        "load": load,
        "importance": [
            x * (0.8 + 0.4 * x / max(load)) / sum(y * (0.8 + 0.4 * y / max(load)) for y in load) for x in load
        ],
        "domain_load": loads,
        "max_violation": max(load) * size.experts - 1,
        "load_entropy": entropy,
        "dead_experts": sum(x == 0 for x in load),
        "router_entropy": 0.9 - 0.1 * depth,
        "selected_probability": share + 0.2 * depth,
        "domain_distance": 0.03 + (0.2 - 0.04 * place) * depth**2 + dice.uniform(0, 0.01),
        "within_distance": 0.02 + dice.uniform(0, 0.004),
        "recall_at_k": share + 0.15 + 0.04 * place + 0.1 * math.sin(6 * depth),
        "chance_recall": share,
        "captured": share + 0.25 + 0.03 * place + 0.1 * math.sin(6 * depth),
        "captured_by_chance": share,
        "overlap": 0.1 + 0.2 * depth - 0.02 * place,
        "shared_norm": 0.5 - 0.2 * depth,
        "routed_norm": 0.6 + 0.2 * depth,
    }


def _load(dice: random.Random, size: Size, spread: float) -> list[float]:
    raw = [math.exp(dice.gauss(0, spread)) for _ in range(size.experts)]
    return [x / sum(raw) for x in raw]


def _run(dice: random.Random, domains: list[str], name: str, lower: float) -> dict[str, Any]:
    steps = [65_536 * i for i in range(1, 61)]

    def curve(noise: float, every: int) -> list[list[float]]:
        return [[t, 3.1 - lower + 0.9 * math.exp(-t / 1e6) + dice.gauss(0, noise)] for t in steps[every - 1 :: every]]

    return {
        "name": name,
        "train": curve(0.03, 1),
        "validation": curve(0.004, 10),
        "domain_validation": {domain: curve(0.004, 10) for domain in domains},
    }
