"""Measure whether layers gain from numbers of shared neurons of their own, at equal cost in every layer.

    python benchmarks/layer_sizes.py SOURCE --calibration PATH --evaluation PATH --form zeros|totals [--experts 16]
        [--top-k 5] [--shared 44] [--tokens 32768] [--seeds 0]

Form i has i expert widths fewer shared neurons (*zeros*: S - i W shared, zeros in their place, k of N + i experts) or
more (*totals*: S + i W shared, k - i of N - i experts, so that a token uses as many neurons). Every layer is converted alone in every
form (``llamamoe budget --measure kl``) and takes the one that loses least. Printed are the perplexities of every form in
all layers, and of the choice by layer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from llamamoe.architectures.dense_checkpoint import DenseModel, understand
from llamamoe.calibration.compute import Compute
from llamamoe.checkpoint.locate import locate, open_checkpoint
from llamamoe.conversion.plan import SplitPlan, plan_split
from llamamoe.conversion.recipe import build_recipe
from llamamoe.conversion.session import make_text, with_clusters
from llamamoe.evaluation.perplexity import scoring_plan
from llamamoe.models.loading import load_weights, open_model
from llamamoe.progress import ignore_progress
from llamamoe.studies.budget.sensitivities.base import Task
from llamamoe.studies.budget.sensitivities.kl import OutputKl
from llamamoe.studies.in_memory import convert_in_memory
from llamamoe.studies.measure import perplexity, replaced_ffns

CPU = Compute(torch.device("cpu"), torch.float32)
FORMS = 3


def plans_of(model: DenseModel, args: argparse.Namespace, seed: int) -> list[SplitPlan]:
    """Return the plans of all forms, the usual sizes first."""
    keys = {"method": "token_clusters", "shared_by": "power", "router": "ridge", "repair": "least_squares", "seed": seed,
            "calibration": args.calibration, "calibration_tokens": args.tokens, "calibration_length": args.length,
            "compute_dtype": "float32", "pad_to": 8}  # fmt: skip

    def plan(experts: int, top_k: int, shared: int) -> SplitPlan:
        return plan_split(model, build_recipe({**keys, "num_experts": experts, "top_k": top_k, "shared": shared}))

    n, k, s = args.experts, args.top_k, args.shared
    width = plan(n, k, s).layout.expert_width
    if args.form == "zeros":
        return [plan(n + i, k, s - i * width) for i in range(FORMS)]
    return [plan(n - i, k - i, s + i * width) for i in range(FORMS)]


def measure(model: DenseModel, args: argparse.Namespace, seed: int, dense: Any, held_out: Any) -> None:
    plans, layers = plans_of(model, args, seed), model.spec.num_layers
    text = make_text(plans[0], CPU, ignore_progress)
    ranks = tuple((1 + i) / (2 + FORMS) for i in range(FORMS))  # of no effect: the losses are read as measured
    with tempfile.TemporaryDirectory() as folder:
        loss_FL = OutputKl().measure(Task(tuple(plans), ranks, text, CPU, Path(folder))).damage_BL
    best = loss_FL.argmin(0)
    choices = {f"form {i}": [i] * layers for i in range(FORMS)} | {"by layer": best.tolist()}
    for name, chosen in choices.items():
        loss = sum(loss_FL[form, layer] for layer, form in enumerate(chosen))
        own = [plans[form] for form in chosen]
        ffns = convert_in_memory(plans[0], with_clusters(plans[0], text), CPU, by_layer=own).ffns
        with replaced_ffns(dense, ffns):
            found = perplexity(dense, held_out, 8).mean_over_domains.perplexity
        print(
            f"seed {seed}, {args.form}, {name} {chosen}: perplexity {found:.4f}, sum of losses {loss:.4f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--form", choices=["zeros", "totals"], required=True)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--shared", type=int, default=44)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--evaluation-tokens", type=int, default=16384)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    location = locate(args.source)
    held_out, _ = scoring_plan(
        open_model(location.path), args.evaluation, max_tokens=args.evaluation_tokens, context_length=args.length
    )
    dense = load_weights(held_out.side, "float32", "cpu")
    print(f"dense: perplexity {perplexity(dense, held_out, 8).mean_over_domains.perplexity:.4f}", flush=True)
    for seed in args.seeds:
        measure(understand(open_checkpoint(location)), args, seed, dense, held_out)


if __name__ == "__main__":
    main()
