"""Measure attention as experts (target jetmoe) beside a conversion of the FFNs alone at equal active parameters.

    python benchmarks/attention_experts.py SOURCE --calibration PATH --evaluation PATH [--top-k 1 2] [--tokens 8192]

For every k: attention and FFNs with k of N experts, N the query heads of a key/value head. Then its controls, with the same
FFN method and repair: attention's router random, and the same heads for every token (those that contribute most on
average; a simulation, as no router can hold it). Then FFNs alone, narrower experts: the two k around as many active
parameters.
Results are kept as they are finished.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import llamamoe
from llamamoe.conversion import attention
from llamamoe.evaluation.perplexity import ScoringPlan, scoring_plan
from llamamoe.methods.attention import HeadInputs, RoutedHeads, head_contributions
from llamamoe.methods.layer import LayerContext
from llamamoe.models.loading import load_weights, open_model
from llamamoe.studies.measure import perplexity

FINE = 24
"""Experts of the conversion of FFNs alone."""
ROUTERS = ("fitted", "random", "static")


def _random(routed: RoutedHeads, text: HeadInputs, context: LayerContext) -> torch.Tensor:
    return torch.from_numpy(context.rng("random control").normal(size=tuple(routed.router_NH.shape))).float()


@contextmanager
def router(kind: str, chosen: dict[int, torch.Tensor]) -> Iterator[None]:
    """Replace the fitted rows of attention; ``static`` also the choice, which is left in ``chosen`` by layer."""
    if kind == "fitted":
        yield
        return
    held: list[torch.Tensor] = []

    def static(routed: RoutedHeads, text: HeadInputs, context: LayerContext) -> torch.Tensor:
        scores = head_contributions(routed, text.inputs.device)
        mean_N = sum(scores(heads_BQ).sum(0) for heads_BQ in text.heads())
        weights_N = torch.zeros(len(routed.router_NH))
        weights_N[mean_N.topk(routed.top_k).indices] = routed.factor / routed.top_k  # type: ignore[union-attr]
        held[:] = [weights_N]
        chosen[context.layer] = weights_N
        return _random(routed, text, context)

    def weights(self: RoutedHeads, x_BH: torch.Tensor) -> torch.Tensor:
        return held[0].expand(len(x_BH), -1)

    rows: Callable[..., torch.Tensor] = static if kind == "static" else _random
    with mock.patch.object(attention, "head_rows", rows):
        if kind == "random":
            yield
        else:
            with mock.patch.object(RoutedHeads, "expert_weights", weights):
                yield


def measure(folder: Path, text: ScoringPlan, chosen: dict[int, torch.Tensor]) -> float:
    """Return the perplexity, with constant logits where attention selects the same heads for every token."""
    model = load_weights(open_model(folder), "float32", "cpu")
    for layer, weights_N in chosen.items():
        gate = model.model.layers[layer].self_attention.experts.router.layer
        logits_N = weights_N.sign() * 1e-6
        gate.register_forward_hook(lambda _, args, out, logits_N=logits_N: logits_N.expand_as(out))
    return perplexity(model, text, 4).mean_over_domains.perplexity


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield name, recipe and attention router of every conversion."""
    given = {
        "calibration": [options.calibration], "calibration_tokens": options.tokens, "calibration_length": options.length,
        "method": options.method, "router": "ridge", "repair": {"name": "least_squares", "ridge": "auto"}, "shared": 0,
        "dtype": "float32", "rescale": "dropout",
    }  # fmt: skip
    for top_k in options.top_k:
        wanted = given | {"target": "jetmoe", "top_k": top_k}
        plan = llamamoe.plan_conversion(options.source, llamamoe.load_recipe(given=wanted))
        name = f"{top_k} of {plan.layout.num_experts}"
        for kind in ROUTERS:
            yield f"{name}, {kind} attention", wanted, kind
        alone = given | {"target": "mixtral", "num_experts": FINE}
        fine = most(options.source, alone, plan.cost.active_parameters)
        for each in (fine, fine + 1):  # the two around as many active parameters
            yield f"FFNs alone, {each} of {FINE}", alone | {"top_k": each}, "fitted"


def most(source: str, given: dict[str, Any], active: int) -> int:
    """Return the largest k with no more active parameters than ``active``, 1 at least."""
    for top_k in range(FINE, 1, -1):
        plan = llamamoe.plan_conversion(source, llamamoe.load_recipe(given=given | {"top_k": top_k}))
        if plan.cost.active_parameters <= active:
            return top_k
    return 1


def main() -> None:
    """Parse, convert, measure, write after every conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--top-k", type=int, nargs="+", default=[2])
    parser.add_argument("--method", default="token_clusters")
    parser.add_argument("--tokens", type=int, default=8192, help="Of calibration.")
    parser.add_argument("--evaluation-tokens", type=int, default=1024, help="Of each domain.")
    parser.add_argument("--length", type=int, default=256, help="Of a sequence, in both.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attention_experts.json"))
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text, _ = scoring_plan(
        open_model(options.source),
        [options.evaluation],
        max_tokens=options.evaluation_tokens,
        context_length=options.length,
    )
    found = json.loads(options.json.read_text()) if options.json.exists() else []

    def keep(row: dict[str, Any]) -> None:
        found.append(row)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(row, flush=True)

    base = {"source": Path(options.source).name, "tokens": options.tokens, "method": options.method}

    def known(name: str) -> bool:
        return any({**base, "name": name}.items() <= row.items() for row in found)

    if not known("dense"):
        keep({**base, "name": "dense", "perplexity": measure(Path(options.source), text, {})})
    for name, given, kind in rows_of(options):
        if known(name):
            continue
        began, chosen, out = time.monotonic(), {}, options.work / "attention"  # type: ignore[var-annotated]
        with router(kind, chosen):
            result = llamamoe.split(options.source, out, llamamoe.load_recipe(given=given), verify=False, force=True)
        cost = result.plan.cost.active_parameters / result.plan.parent_cost.active_parameters
        errors = [each.get("attention_error", 0.0) for each in result.receipt["layers"]]
        row = {**base, "name": name, "perplexity": measure(out, text, chosen), "active": round(cost, 4)}
        keep({**row, "attention_error": sum(errors) / len(errors), "seconds": round(time.monotonic() - began)})


if __name__ == "__main__":
    main()
