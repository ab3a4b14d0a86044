"""Run one model on the text of a report: its losses and its routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LlamaMoeError
from ..evaluation.perplexity import ScoringPlan
from ..evaluation.scores import Counts
from ..lazy import torch
from .quality import HeadContributions, OracleCollector, OutputNorms, query_heads
from .routing import RoutingCollector
from .text import batches, counts


@dataclass(frozen=True)
class Reading:
    """The result of running a model.

    Attributes:
        dtype: Dtype of the weights.
        counts: Sums over documents by domain, from which scores are computed.
        routing: Routing statistics as JSON-compatible data, those of attention experts under ``attention``; None for a
            dense model.
    """

    dtype: str
    counts: dict[str, Counts]
    routing: dict[str, Any] | None


def read(
    plan: ScoringPlan,
    *,
    dtype: str,
    device: str,
    mixture: bool,
    oracle_tokens: int,
    advance: Callable[[int], None],
) -> Reading:
    """Load a model, run it on the text, and release it.

    Args:
        plan: The model and the text in its tokens.
        dtype: ``"auto"`` or a dtype's name.
        device: A torch device.
        mixture: Whether to collect its routing.
        oracle_tokens: Number of tokens per domain; see `OracleCollector`.
        advance: Called with the tokens of every batch.

    Raises:
        LlamaMoeError: A loss is not finite.
    """
    from ..models.loading import free_memory, load_weights

    model = load_weights(plan.side, dtype, device)
    used = str(model.dtype).removeprefix("torch.")
    try:
        with torch.no_grad():
            nll, routing = _read(model, plan, mixture, oracle_tokens, advance)
    finally:
        del model
        free_memory()
    return Reading(used, counts(plan, nll), routing)


def _read(
    model: Any, plan: ScoringPlan, mixture: bool, oracle_tokens: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[str, Any] | None]:
    from ..training.loss_head import LossHead
    from ..training.moe_layers import find_moe_layers
    from ..training.routing import RouterTap

    head, nll = LossHead(model), np.zeros(len(plan.windows))
    layers = find_moe_layers(model) if mixture else []
    parts = {part: [moe for moe in layers if moe.part == part] for part in dict.fromkeys(moe.part for moe in layers)}
    found = {part: RoutingCollector(mine, list(plan.domains)) for part, mine in parts.items()}
    oracle = OracleCollector(layers, getattr(model.config.get_text_config(), "hidden_act", "silu"), oracle_tokens)
    tap, norms, heads = RouterTap(layers), OutputNorms(model, layers), HeadContributions(model, layers)
    for batch in batches(plan):
        asked = mixture and oracle.wants(batch.domain)
        with tap.armed(inputs=asked) as routings, norms.listening(batch), heads.listening(wanted=asked) as scores:
            nll[batch.windows] = _losses(model, head, batch.ids_BT, batch.real_BT)
        if not np.isfinite(nll[batch.windows]).all():
            raise LlamaMoeError(
                f"the loss of {plan.side.name} on the domain '{batch.domain}' is not finite.",
                hint="Try dtype float32; if that does not help, the weights are broken.",
            )
        for part, collector in found.items():
            collector.add(batch, [each for each in routings if each.moe.part == part])
        if asked:
            oracle.add(batch, routings, scores)
        advance(int(batch.real_BT.sum()) - len(batch.windows))
    tap.close()
    told = {part: collector.to_json(plan.side.tokenizer) for part, collector in found.items()}
    for part, mine in parts.items():
        for moe, layer in zip(mine, told[part]["layers"], strict=True):
            layer |= {**oracle.of_layer(moe), **norms.of_layer(moe)}
    if "attention" in told:
        groups = int(model.config.num_key_value_heads)
        told["ffn"]["attention"] = told["attention"] | {
            "query_heads": query_heads(groups, parts["attention"][0].num_experts)
        }
    return nll, told.get("ffn")


def _losses(model: Any, head: Any, ids_BT: Any, real_BT: Any) -> np.ndarray:
    """Return the negative log-likelihood of each window's tokens except the first, float64 ``[B]``."""
    from ..training.loss_head import IGNORED, next_token_labels

    labels_BT = next_token_labels(ids_BT.masked_fill(~real_BT, IGNORED)).to(model.device)
    losses = head(model, {"input_ids": ids_BT.to(model.device), "use_cache": False}, labels_BT)
    summed: np.ndarray = losses.nll_BT.double().sum(1).cpu().numpy()
    return summed
