"""Measure whether it matters which query heads form an expert of attention (target jetmoe).

    python benchmarks/head_grouping.py SOURCE --calibration PATH --evaluation PATH [--top-k 1 2] [--tokens 4096]

Every expert has one query head of each key/value head; which one is free, as a permutation of the heads of a key/value
head, with its rows and columns, leaves the parent's function unchanged. *grouped*: per layer, the permutations with which the
k best experts of a token hold most of the power ``||o_n a_n||^2`` of its heads, found by coordinate ascent from the stored order
on the calibration text. *random*: control. Only attention is routed (router and output fitted as in a conversion); FFNs stay
dense, so that nothing else changes. Results are printed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.calibration.compute import Compute
from llamamoe.calibration.heads import running
from llamamoe.calibration.walk import Walk, read_ffn
from llamamoe.conversion.attention import convert_attention, heads_as_stored
from llamamoe.conversion.layer import layer_context
from llamamoe.conversion.texts import make_text
from llamamoe.evaluation.perplexity import scoring_plan
from llamamoe.methods.moe_layer import dense_outputs
from llamamoe.models.loading import open_model
from llamamoe.progress import ignore_progress
from llamamoe.studies.measure import perplexity

CPU = Compute(torch.device("cpu"), torch.float32)


def shares(folder: Path, ids_ST: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """Return of every layer the power of each head, as a share of the token's, ``[T, G, N]``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for layer in model.model.layers:
        found.append([])
        attention = layer.self_attn
        columns = attention.o_proj.weight.detach().view(len(attention.o_proj.weight), -1, attention.head_dim)
        gram = torch.einsum("hnd,hne->nde", columns, columns)

        def see(_: Any, args: tuple[torch.Tensor], into: Any = found[-1], gram: Any = gram) -> None:
            heads = args[0].flatten(0, 1).unflatten(1, (len(gram), -1))
            power = torch.einsum("tnd,nde,tne->tn", heads, gram, heads)
            into.append((power / power.sum(1, keepdim=True)).unflatten(1, (groups, -1)))

        attention.o_proj.register_forward_pre_hook(see)
    with torch.no_grad():
        for ids in ids_ST.split(8):
            model.model(ids)
    return [torch.cat(each) for each in found]


def grouped(share_TGN: torch.Tensor, top_k: int) -> list[list[int]]:
    """Return for every key/value head the order of its query heads."""
    _, groups, count = share_TGN.shape
    orders = [list(range(count)) for _ in range(groups)]

    def held(group: int, order: list[int]) -> float:
        total = sum(share_TGN[:, g, o] for g, o in enumerate(orders) if g != group) + share_TGN[:, group, order]
        return float(total.topk(top_k).values.sum())

    while True:
        before = [list(order) for order in orders]
        for group in range(1, groups):
            orders[group] = max((list(p) for p in permutations(range(count))), key=lambda o, g=group: held(g, o))
        if orders == before:
            return orders


def permuted(source: Path, out: Path, orders: list[list[list[int]]], head_dim: int) -> None:
    """Write the parent with its query heads in another order."""
    out.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            if path.is_file():
                shutil.copy(path, out)
            continue
        tensors = load_file(path)
        for layer, order in enumerate(orders):
            heads = [len(o) * g + n for g, o in enumerate(order) for n in o]
            rows = (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()
            for part in ("q_proj", "o_proj"):
                name = f"model.layers.{layer}.self_attn.{part}.weight"
                if name in tensors:
                    value = tensors[name]
                    tensors[name] = (value[rows] if part == "q_proj" else value[:, rows]).contiguous()
        save_file(tensors, out / path.name, {"format": "pt"})


def measure(folder: Path, given: dict[str, Any], text: Any, scored: Any) -> tuple[float, float]:
    """Return the mean error of attention, and the perplexity with routed attention and dense FFNs."""
    plan = llamamoe.plan_conversion(folder, llamamoe.load_recipe(given=given))
    walk = Walk(plan.model, text, CPU, weights_dtype=torch.float32)
    walk.start()
    heads, errors = [], []
    for layer in range(plan.model.spec.num_layers):

        def convert(inputs: Any, layer: int = layer) -> Any:
            found = convert_attention(plan, layer, layer_context(plan, layer), inputs)
            errors.append(found.facts["attention_error"])
            heads.append(heads_as_stored(plan, found.heads))
            return heads[-1]

        inputs = walk.enter(layer, convert)
        walk.leave(layer, dense_outputs(inputs, read_ffn(plan.model, layer)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer, routed in zip(model.model.layers, heads, strict=True):
        running(layer.self_attn, routed).__enter__()
    return sum(errors) / len(errors), perplexity(model, scored, 4).mean_over_domains.perplexity


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=4096, help="Of calibration.")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, help="Of each domain.")
    parser.add_argument("--length", type=int, default=256, help="Of a sequence, in both.")
    parser.add_argument("--controls", type=int, default=2, help="Random orders.")
    options = parser.parse_args()
    scored, _ = scoring_plan(
        open_model(options.source),
        [options.evaluation],
        max_tokens=options.evaluation_tokens,
        context_length=options.length,
    )
    for top_k in options.top_k:
        given = {
            "calibration": [options.calibration], "calibration_tokens": options.tokens, "calibration_length": options.length,
            "method": "token_clusters", "router": "ridge", "repair": {"name": "least_squares", "ridge": "auto"}, "shared": 0,
            "dtype": "float32", "rescale": "dropout", "target": "jetmoe", "top_k": top_k,
        }  # fmt: skip
        plan = llamamoe.plan_conversion(options.source, llamamoe.load_recipe(given=given))
        text, spec = make_text(plan, CPU, ignore_progress), plan.model.spec
        share = shares(options.source, torch.from_numpy(text.ids_ST), spec.num_kv_heads)
        count, groups = plan.layout.num_experts, spec.num_kv_heads
        every = {"stored": None, "grouped": [grouped(each, top_k) for each in share]}
        for seed in range(options.controls):
            draw = torch.Generator().manual_seed(seed)
            every[f"random {seed}"] = [
                [torch.randperm(count, generator=draw).tolist() for _ in range(groups)] for _ in share
            ]
        for name, orders in every.items():
            with tempfile.TemporaryDirectory() as work:
                folder = options.source
                if orders is not None:
                    folder = Path(work, "parent")
                    permuted(options.source, folder, orders, spec.head_dim)
                error, found = measure(folder, given, text, scored)
            row = {
                "source": options.source.name,
                "k": top_k,
                "of": count,
                "heads": name,
                "error": error,
                "perplexity": found,
            }
            print(row, flush=True)


if __name__ == "__main__":
    main()
