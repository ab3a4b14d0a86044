"""Measure mixtures whose experts are split into pieces of which fewer are selected, beside controls of the same cost.

    python benchmarks/finer_pieces.py NAME --model MIXTURE --train train.jsonl --validation valid.jsonl --pieces 4 --top-k 4

The arms are ``llamamoe resplit`` with its default method and with a random partition; MODEL with fewer experts
(``retop``), as it is and repaired; and MODEL with every expert pruned to its strongest neurons, repaired. All repairs
are the same. The layers are made by the library's own functions, one after another, and run in place of the FFNs of
transformers' model, without files. Results are added to benchmarks/results/finer-pieces.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamamoe.architectures.moe_checkpoint import ConvertedModel
from llamamoe.architectures.moe_layout import weight
from llamamoe.calibration.compute import Compute
from llamamoe.calibration.text import calibration_text
from llamamoe.checkpoint.reader import SafetensorsCheckpoint
from llamamoe.methods.layer import ExpertWeights, LayerContext, LayerInputs, Partition, token_scales
from llamamoe.methods.moe_layer import ConvertedFfn, MixtureFfn, dense_outputs
from llamamoe.methods.repairs.least_squares import LeastSquares
from llamamoe.transforms.resplitting.layer import PieceRouting, finer_layer, mixture_ffn, own_inputs, router_mode
from llamamoe.transforms.resplitting.plan import planned
from llamamoe.transforms.resplitting.recipe import load_resplit_recipe
from llamamoe.transforms.resplitting.walk import MixtureWalk

RESULTS = Path(__file__).parent / "results" / "finer-pieces.json"
Arm = Callable[[int, MixtureFfn, LayerInputs], ConvertedFfn]
CPU = Compute(torch.device("cpu"), torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    for option in ("--model", "--train", "--validation"):
        parser.add_argument(option, required=True)
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--top-k", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--held-out-tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    study = Study(args)
    found = {"model": perplexity(study, {})}
    for name, arm in arms(study).items():
        found[name] = perplexity(study, study.layers(arm))
        print(f"{name}: {found[name]:.2f}", flush=True)
    told = {key: getattr(args, key) for key in ("pieces", "top_k", "tokens", "held_out_tokens")}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, args.name: {**told, "perplexity": found}}, indent=1) + "\n")


class Study:
    """A mixture and its texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder = Path(args.model)
        self.source = ConvertedModel(SafetensorsCheckpoint(self.folder))
        self.pieces, self.top_k, self.seed = args.pieces, args.top_k, 0
        self.text, self.held_out = (
            calibration_text(
                [path],
                AutoTokenizer.from_pretrained(self.folder),
                num_tokens=tokens,
                length=args.length,
                weights=None,
                seed=self.seed,
                vocab_size=self.source.spec.vocab_size,
            )
            for path, tokens in ((args.train, args.tokens), (args.validation, args.held_out_tokens))
        )

    def layers(self, arm: Arm) -> dict[int, ConvertedFfn]:
        """Convert layer after layer, each on the outputs of those before it."""
        walk, found = MixtureWalk(self.source, self.text, CPU), {}
        walk.start()
        for layer in range(self.source.spec.num_layers):
            inputs, parent = walk.enter(layer), mixture_ffn(self.source, layer)
            found[layer] = arm(layer, parent, inputs)
            walk.leave_changed(layer, inputs, dense_outputs(inputs, parent), found[layer].outputs(inputs))
        return found


def arms(study: Study) -> dict[str, Arm]:
    """The arms by name."""
    return {
        "resplit": finer(study, "token_clusters"),
        "resplit, random pieces": finer(study, "random"),
        "fewer experts": lambda layer, parent, inputs: fewer(study, parent, inputs),
        "fewer experts, repaired": lambda layer, parent, inputs: repaired(
            layer, fewer(study, parent, inputs), parent, inputs
        ),
        "pruned experts, repaired": lambda layer, parent, inputs: repaired(
            layer, pruned(study, parent, inputs), parent, inputs
        ),
    }


def finer(study: Study, method: str) -> Arm:
    given = {
        "pieces": study.pieces,
        "top_k": study.top_k,
        "method": method,
        "calibration": ["text"],
        "seed": study.seed,
    }
    recipe = load_resplit_recipe(given=given)
    layout, plan = planned(study.source, recipe)
    baked = plan.factor if plan.where == "weights" else 1.0
    routing = PieceRouting(recipe, study.source, layout, layout.combine.factor, baked, "F32", "F32")
    return lambda layer, parent, inputs: finer_layer(routing, layer, parent, inputs)[0]


def repaired(layer: int, moe: ConvertedFfn, parent: MixtureFfn, inputs: LayerInputs) -> ConvertedFfn:
    """The layer with the repair that resplit has by default."""
    width = moe.partition.experts.shape[1]
    context = LayerContext(layer, moe.num_experts, moe.top_k, width, 0, inputs)
    return replace(moe, weights=LeastSquares(LeastSquares.Options()).repair(moe, parent, context))


def fewer(study: Study, parent: MixtureFfn, inputs: LayerInputs) -> ConvertedFfn:
    """The model with as many experts as cost the same."""
    moe = parent.moe
    top_k = study.top_k // study.pieces
    ratio = 1.0
    if router_mode(parent, inputs) == "hard":  # selected experts keep their coefficient, as with retop
        ratio = weight(moe.weighting, moe.num_experts, moe.top_k) / weight(moe.weighting, moe.num_experts, top_k)
    return replace(moe, top_k=top_k, factor=moe.factor * ratio)


def pruned(study: Study, parent: MixtureFfn, inputs: LayerInputs) -> ConvertedFfn:
    """Every expert with its strongest neurons on its own tokens; as many as cost the same."""
    moe, kept = parent.moe, []
    (count, width), none = moe.partition.experts.shape, np.empty(0, np.int64)
    weights_TN = torch.cat([moe.expert_weights(x_BH) for x_BH in inputs.inputs()])
    most = width * study.top_k // (study.pieces * moe.top_k)
    for index in range(count):
        own, expert = own_inputs(inputs, weights_TN[:, index]), parent.expert(index)
        scales_T = token_scales(own, "residual")
        power_W = torch.zeros(width)
        for part, h_BW in zip(own.batches(), own.hidden(expert), strict=True):
            power_W += (h_BW * scales_T[part][:, None]).square().sum(0)
        power_W *= expert.down_HF.square().sum(0)
        kept.append(np.sort(np.argsort(-power_W.numpy(), kind="stable")[:most]) + index * width)
    partition = Partition(np.stack(kept), none, none)
    return replace(moe, partition=partition, weights=ExpertWeights.of_parent(parent, partition))


def perplexity(study: Study, layers: dict[int, ConvertedFfn]) -> float:
    """Perplexity on the held-out text, with converted layers in the place of the model's FFNs."""
    model: Any = AutoModelForCausalLM.from_pretrained(study.folder, dtype=torch.float32, experts_implementation="eager")
    for layer, moe in layers.items():

        def forward(x_BTH: torch.Tensor, moe: ConvertedFfn = moe) -> torch.Tensor:
            x_BH = x_BTH.flatten(0, 1)
            inputs = LayerInputs(x_BH, torch.ones(len(x_BH)), CPU.device, CPU.dtype)
            return torch.cat(list(moe.outputs(inputs))).view_as(x_BTH)

        model.model.layers[layer].mlp.forward = forward
    total, ids_ST = 0.0, torch.from_numpy(study.held_out.ids_ST)
    for ids_BT in ids_ST.split(16):
        logits = model(ids_BT, use_cache=False).logits[:, :-1]
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
        )
    return math.exp(total / ids_ST[:, 1:].numel())


if __name__ == "__main__":
    main()
