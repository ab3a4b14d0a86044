"""Measure the perplexity of conversions in memory: the dense model runs with its FFNs replaced, and a cell's result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..evaluation.perplexity import ScoringPlan
from ..evaluation.scores import ModelScores, model_scores
from ..lazy import torch
from ..methods.layer import BATCH_TOKENS, LayerInputs
from ..methods.moe_layer import ConvertedFfn
from .by_layer import LayerPlans
from .cells import Cell


def inputs_of(x_TH: torch.Tensor) -> LayerInputs:
    """Return tokens as a layer's inputs, with their own device and dtype."""
    scale = x_TH.new_ones(1).expand(len(x_TH))
    return LayerInputs(x_TH, scale, x_TH.device, x_TH.dtype, batch_tokens=BATCH_TOKENS)


@contextmanager
def replaced_ffns(model: Any, ffns: Mapping[int, ConvertedFfn]) -> Iterator[None]:
    """Replace the FFNs of these layers until the end of the context.

    All experts are computed and the unselected ones multiplied by zero.

    Args:
        model: A dense model of transformers, whose decoder layers have an ``mlp``.
        ffns: Replacements by layer.
    """
    device = next(model.parameters()).device

    def runs(ffn: ConvertedFfn) -> Callable[[torch.Tensor], torch.Tensor]:
        ffn = _moved(ffn, device)

        def forward(x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            return torch.cat(list(ffn.outputs(inputs_of(flat)))).reshape(x.shape).to(x.dtype)

        return forward

    layers = model.get_decoder().layers
    try:
        for layer, ffn in ffns.items():
            layers[layer].mlp.forward = runs(ffn)
        yield
    finally:
        for layer in ffns:
            layers[layer].mlp.__dict__.pop("forward", None)


def _moved(ffn: ConvertedFfn, device: torch.device) -> ConvertedFfn:
    """Return the layer with its weights on the device in use, so that they are not copied for every batch."""
    from ..methods.layer import ExpertWeights

    weights = ffn.weights
    matrices = (matrix.to(device) for matrix in (weights.gate_PH, weights.up_PH, weights.down_HP))
    return replace(ffn, weights=ExpertWeights(*matrices), router_NH=ffn.router_NH.to(device))


def perplexity(
    model: Any, text: ScoringPlan, batch_size: int, advance: Callable[[int], None] = lambda tokens: None
) -> ModelScores:
    """Score a loaded model, by the protocol of `llamamoe.evaluate`.

    Raises:
        LlamaMoeError: A loss is not finite.
    """
    counts = text.score(model, batch_size, advance)
    return model_scores(text.side.name, str(model.dtype).removeprefix("torch."), counts)


def result_of(cell: Cell, scores: ModelScores, own: LayerPlans | None) -> dict[str, Any]:
    """Return the result of a cell as JSON-compatible data, without the facts about layers and the run."""
    plan, mean = cell.plan, scores.mean_over_domains
    sizes: dict[str, Any] = {}
    if plan is not None:
        layout = plan.layout
        sizes = {
            "num_experts": layout.num_experts,
            "top_k": layout.top_k,
            "expert_width": layout.expert_width,
            "shared": layout.num_shared,
            "target": plan.target.name,
            **(own.facts if own else {}),
        }
    return {
        "method": cell.method,
        "kind": cell.kind,
        "base": cell.base,
        "simulated": cell.simulated,
        "budget": cell.budget,
        "seed": cell.seed,
        "share": own.share if own else cell.share,
        "sizes": sizes,
        "loss": mean.loss,
        "perplexity": mean.perplexity,
        "bits_per_byte": mean.bits_per_byte,
        "domains": {
            name: {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
            for name, score in scores.domains.items()
        },
    }


def finite(value: Any) -> Any:
    """Return data for strict JSON: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
