"""Measure the cost of the size of a calibrated router's logits, and whether 16-bit softmax selects the same experts.

    python benchmarks/router_scale.py SOURCE --calibration PATH --evaluation PATH [--std hard 0.05 0.25 1] [--repair least_squares]

A hard router weighs all selected experts the same; its logits are so small that programs which choose by probabilities
in bfloat16 see ties. For every standard deviation of the logits (over experts, mean over calibration tokens) the model is
converted in memory with weights ``softmax(logits)``, routed outputs multiplied by one number per layer so that the mean
weight of a selected expert is 1, and repaired with those weights. It is measured twice: as transformers runs it in float32, and
with experts chosen and weighed by probabilities that are rounded to bfloat16. Results are kept as they are finished.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import llamamoe
from llamamoe.calibration.compute import choose_compute
from llamamoe.calibration.walk import Walk, cast_ffn, read_ffn
from llamamoe.checkpoint.tensors import torch_dtype
from llamamoe.conversion.layer import convert_layer
from llamamoe.conversion.texts import make_text
from llamamoe.evaluation.perplexity import ScoringPlan, scoring_plan
from llamamoe.methods.layer import FfnWeights, LayerInputs
from llamamoe.methods.moe_layer import ConvertedFfn, dense_outputs
from llamamoe.models.loading import load_weights, open_model
from llamamoe.studies.measure import perplexity, replaced_ffns

if TYPE_CHECKING:
    from llamamoe.conversion.plan import SplitPlan


@dataclass(frozen=True)
class RoundedFfn(ConvertedFfn):
    """A layer whose experts are chosen and weighed by softmax probabilities stored in bfloat16.

    Attributes:
        tally: Tokens, and those whose set of experts is not that of the logits.
    """

    tally: list[int] = field(default_factory=lambda: [0, 0], compare=False)

    def expert_weights(self, x_BH: torch.Tensor, logits_BN: torch.Tensor | None = None) -> torch.Tensor:
        """See `ConvertedFfn.expert_weights`; for the weighting ``"softmax"`` only."""
        assert logits_BN is None
        assert self.weighting == "softmax"
        logits = x_BH.float() @ self.router_NH.T
        rounded = logits.softmax(-1).bfloat16()
        top = rounded.topk(self.top_k, dim=-1)
        wanted = torch.zeros_like(logits).scatter_(-1, logits.topk(self.top_k, dim=-1).indices, 1.0)
        found = torch.zeros_like(logits).scatter_(-1, top.indices, 1.0)
        self.tally[0] += len(logits)
        self.tally[1] += int((wanted != found).any(-1).sum())
        return torch.zeros_like(logits).scatter_(-1, top.indices, top.values.float() * self.factor)


def rounded_of(moe: ConvertedFfn) -> RoundedFfn:
    """The same layer as such a program runs it."""
    return RoundedFfn(**{name: getattr(moe, name) for name in ConvertedFfn.__dataclass_fields__})


def with_std(moe: ConvertedFfn, inputs: LayerInputs, std: float) -> ConvertedFfn:
    """The layer with logits of this standard deviation, its routed outputs divided by the mean weight of a selected expert."""
    spread = total = 0.0
    for x_BH in inputs.inputs():
        spread += float((x_BH.float() @ moe.router_NH.T).std(-1, correction=0).double().sum())
    moe = replace(moe, router_NH=moe.router_NH * (std * inputs.num_tokens / spread))
    for x_BH in inputs.inputs():
        total += float(moe.expert_weights(x_BH).double().sum())
    mean, shared = total / (inputs.num_tokens * moe.top_k), len(moe.partition.shared)
    down = moe.weights.down_HP.clone()
    down[:, shared:] /= mean
    return replace(moe, weights=replace(moe.weights, down_HP=down))


def convert(plan: SplitPlan, std: float | None, scratch: Path) -> tuple[dict[int, ConvertedFfn], list[dict[str, Any]]]:
    """All layers as functions; ``std`` None is the hard router."""
    assert plan.calibration is not None
    compute, dtype = choose_compute(plan.recipe, plan.source_dtype), torch_dtype(plan.dtype)
    text = make_text(plan, compute, scratch, llamamoe.progress.ignore_progress)
    walk = Walk(plan.model, text, compute, weights_dtype=dtype)
    walk.start()
    ffns: dict[int, ConvertedFfn] = {}
    facts = []
    count = plan.model.spec.num_layers
    for layer in range(count):
        inputs = walk.enter(layer)
        if layer in plan.layout.dense_layers:
            outputs = dense_outputs(inputs, cast_ffn(read_ffn(plan.model, layer), dtype))
        else:

            def adapt(moe: ConvertedFfn, _: FfnWeights, inputs: LayerInputs = inputs) -> ConvertedFfn:
                return moe if std is None else with_std(moe, inputs, std)

            done = convert_layer(plan, layer, inputs, adapt)
            assert done.moe is not None
            ffns[layer] = done.moe
            facts.append(done.facts)
            outputs = done.moe.outputs(inputs)
        if layer + 1 < count:
            walk.leave(layer, outputs)
    return ffns, facts


def measure(model: Any, text: ScoringPlan, ffns: dict[int, ConvertedFfn]) -> dict[str, float]:
    """Perplexity as it is and by rounded probabilities, and the share of changed sets."""
    with replaced_ffns(model, ffns):
        exact = perplexity(model, text, 4).mean_over_domains
    rounded = {layer: rounded_of(moe) for layer, moe in ffns.items()}
    with replaced_ffns(model, rounded):
        other = perplexity(model, text, 4).mean_over_domains
    tokens, changed = (sum(moe.tally[i] for moe in rounded.values()) for i in (0, 1))
    return {"perplexity": exact.perplexity, "perplexity_bf16": other.perplexity, "changed_sets": changed / tokens}


def main() -> None:
    """Parse, convert, measure, write after every conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="Of calibration.")
    parser.add_argument("--evaluation-tokens", type=int, default=1024, help="Of each domain.")
    parser.add_argument("--length", type=int, default=512, help="Of a sequence, in both.")
    parser.add_argument("--repair", nargs="*", default=["least_squares"])
    parser.add_argument("--std", nargs="*", default=["hard", "0.05", "0.25", "0.5", "1"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/router_scale.json"))
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    opened = open_model(options.source)
    text, _ = scoring_plan(
        opened, [options.evaluation], max_tokens=options.evaluation_tokens, context_length=options.length
    )
    model = load_weights(opened, "float32", "cpu")
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for repair in options.repair:
            for std in options.std:
                key = {
                    "source": Path(options.source).name,
                    "tokens": options.tokens,
                    "repair": repair,
                    "std": std,
                    "seed": seed,
                }
                if any(key.items() <= row.items() for row in rows):
                    continue
                began = time.monotonic()
                given = {
                    "calibration": [options.calibration], "calibration_tokens": options.tokens,
                    "calibration_length": options.length, "target": "qwen2_moe", "rescale": "unit", "seed": seed,
                    "router_scale": "hard" if std == "hard" else "soft", "compute_dtype": "bfloat16",
                    "repair": repair if repair != "least_squares" else {
                        "name": "least_squares", "ridge": 0.02, "weighting": "residual"},
                }  # fmt: skip
                plan = llamamoe.plan_conversion(options.source, llamamoe.load_recipe(given=given))
                ffns, facts = convert(plan, None if std == "hard" else float(std), options.work)
                row: dict[str, Any] = {**key, **measure(model, text, ffns)}
                row["output_error"] = sum(fact["output_error"] for fact in facts) / len(facts)
                row["seconds"] = round(time.monotonic() - began)
                rows.append(row)
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
