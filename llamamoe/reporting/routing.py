"""Collect routing by domain of a text: load, distance between domains, overlap, tokens and their experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..lazy import torch
from ..training.moe_layers import MoeLayer
from ..training.routing import Routing
from ..training.routing_statistics import LayerStatistics, RoutingStatistics
from .text import TextBatch

TOP_TOKENS, LEAST_COUNT = 6, 3
"""Number of tokens shown per expert, and minimum number of times that a token was routed to it."""
PASSAGE_TOKENS = 250


class RoutingCollector:
    """Sums over the batches of a text. O(L N (D + N)) memory, and two bytes for each token and layer.

    Args:
        layers: The model's MoE layers.
        domains: Names of the domains.
    """

    def __init__(self, layers: Sequence[MoeLayer], domains: Sequence[str]) -> None:
        self.layers, self.domains = list(layers), list(domains)
        self._sums = {(domain, half): RoutingStatistics(layers) for domain in domains for half in (0, 1)}
        self._pairs: dict[int, torch.Tensor] = {}
        self._ids: list[np.ndarray] = []
        self._first: list[np.ndarray] = []
        self._passages: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, batch: TextBatch, routings: Sequence[Routing]) -> None:
        """Add a batch; ``routings`` are those of every layer for all of its places, padding included."""
        real = batch.real_BT.flatten().to(routings[0].logits_TN.device)
        half_T = batch.half_B[:, None].expand_as(batch.real_BT).flatten().to(real.device)
        for half in (0, 1):
            kept = real & (half_T == half)
            if bool(kept.any()):
                self._sums[batch.domain, half].add([_only(each, kept) for each in routings])
        first = []
        for each in routings:
            indices_Tk, weights_Tk = each.indices_Tk[real], each.weights_Tk[real]
            chosen_TN = torch.zeros(len(indices_Tk), each.moe.num_experts, device=real.device)
            chosen_TN.scatter_(1, indices_Tk, 1.0)
            pairs_NN = (chosen_TN.T @ chosen_TN).double().cpu()
            before = self._pairs.get(each.moe.layer)
            self._pairs[each.moe.layer] = pairs_NN if before is None else before + pairs_NN
            best = weights_Tk.float().argmax(1, keepdim=True)
            first.append(indices_Tk.gather(1, best).flatten().to(torch.int16).cpu().numpy())
        ids, first_LT = batch.ids_BT[batch.real_BT].numpy(), np.stack(first)
        self._ids.append(ids)
        self._first.append(first_LT)
        if batch.domain not in self._passages:
            length = min(int(batch.real_BT[0].sum()), PASSAGE_TOKENS)
            self._passages[batch.domain] = (ids[:length], first_LT[:, :length])

    def to_json(self, tokenizer: Any) -> dict[str, Any]:
        """Return the routing statistics as JSON-compatible data."""
        from .text import words

        both = {d: _joined([self._sums[d, half].per_layer() for half in (0, 1)]) for d in self.domains}
        whole = _joined(list(both.values()))
        passages = [
            {"domain": domain, "tokens": words(tokenizer, ids), "first_expert": first_LT.tolist()}
            for domain, (ids, first_LT) in self._passages.items()
        ]
        return {
            "tokens": int(sum(map(len, self._ids))),
            "layers": [self._layer(place, layer, both) for place, layer in enumerate(whole)],
            "passages": passages,
            "top_tokens": self._top_tokens(tokenizer),
        }

    def _layer(self, place: int, layer: LayerStatistics, both: Mapping[str, list[LayerStatistics]]) -> dict[str, Any]:
        loads = {domain: _shares(found[place].load) for domain, found in both.items()}
        halves = [_halves(self._sums[domain, 0], self._sums[domain, 1], place) for domain in self.domains]
        within = [js_divergence(*pair) for pair in halves if pair is not None]
        names = list(loads)
        between = [js_divergence(loads[a], loads[b]) for i, a in enumerate(names) for b in names[i + 1 :]]
        return {
            "layer": layer.layer,
            "load": _shares(layer.load).tolist(),
            "importance": _shares(layer.importance).tolist(),
            "domain_load": {domain: load.tolist() for domain, load in loads.items()},
            "max_violation": layer.max_violation,
            "load_entropy": layer.load_entropy_share,
            "dead_experts": int(layer.dead_experts),
            "router_entropy": layer.router_entropy_share,
            "selected_probability": layer.selected_probability,
            "domain_distance": _mean(between),
            "within_distance": _mean(within),
            "overlap": overlap(self._pairs[layer.layer].numpy(), layer.top_k),
        }

    def _top_tokens(self, tokenizer: Any) -> list[list[list[list[Any]]]]:
        """Return, for each layer and expert, the tokens that it receives most exclusively: text, count, share."""
        ids, first_LT = np.concatenate(self._ids), np.concatenate(self._first, axis=1)
        kinds, which, times = np.unique(ids, return_inverse=True, return_counts=True)
        texts: dict[int, str] = {}
        found = []
        for moe, first_T in zip(self.layers, first_LT, strict=True):
            pairs, came = np.unique(np.stack([first_T, which]), axis=1, return_counts=True)
            share = came / times[pairs[1]]
            experts: list[list[list[Any]]] = [[] for _ in range(moe.num_experts)]
            # by exclusiveness and frequency: a token seen three times, always here, is no better than one seen often
            for at in np.argsort(-(share * np.log1p(came)), kind="stable"):
                expert, kind = int(pairs[0, at]), int(pairs[1, at])
                if came[at] < LEAST_COUNT or len(experts[expert]) == TOP_TOKENS:
                    continue
                if kind not in texts:
                    texts[kind] = tokenizer.decode([int(kinds[kind])], clean_up_tokenization_spaces=False)
                experts[expert].append([texts[kind], int(came[at]), round(float(share[at]), 4)])
            found.append(experts)
        return found


def _only(routing: Routing, kept_T: torch.Tensor) -> Routing:
    """Return the routing of some of the tokens."""
    return replace(
        routing,
        logits_TN=routing.logits_TN[kept_T],
        weights_Tk=routing.weights_Tk[kept_T],
        indices_Tk=routing.indices_Tk[kept_T],
        inputs_TH=None,
    )


def _joined(parts: Sequence[Sequence[LayerStatistics]]) -> list[LayerStatistics]:
    """Return the statistics of the layers over several windows of tokens together."""
    found: dict[int, LayerStatistics] = {}
    for each in (each for part in parts for each in part):
        before = found.get(each.layer)
        found[each.layer] = each if before is None else _sum(before, each)
    return [found[layer] for layer in sorted(found)]


def _sum(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    tokens = a.tokens + b.tokens

    def mean(name: str) -> float:
        return float((getattr(a, name) * a.tokens + getattr(b, name) * b.tokens) / tokens)

    return replace(
        a,
        tokens=tokens,
        load=tuple(x + y for x, y in zip(a.load, b.load, strict=True)),
        importance=tuple(x + y for x, y in zip(a.importance, b.importance, strict=True)),
        dropped=a.dropped + b.dropped,
        router_entropy=mean("router_entropy"),
        top1_probability=mean("top1_probability"),
        selected_probability=mean("selected_probability"),
    )


def _halves(a: RoutingStatistics, b: RoutingStatistics, place: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the load of a layer in two halves of a domain; None if one of them is empty."""
    first, second = a.per_layer(), b.per_layer()
    return (_shares(first[place].load), _shares(second[place].load)) if first and second else None


def _shares(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    total = array.sum()
    shares: np.ndarray = array / total if total else np.full(len(array), 1.0 / len(array))
    return shares


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def js_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of two distributions in bits: 0 if equal, 1 if disjoint."""

    def entropy(values: np.ndarray) -> float:
        kept = values[values > 0]
        return -float((kept * np.log2(kept)).sum())

    return max(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def overlap(pairs_NN: np.ndarray, top_k: int) -> float | None:
    """Return how far joint choices of experts deviate from chance: 0 if choices are independent.

    ``mean |P(i and j) / c P(i) P(j) - 1|`` over pairs of experts that are chosen at all, weighted by chance, with c
    such that the chances add up to the k (k - 1) pairs that every token chooses.

    Args:
        pairs_NN: Counts of tokens that chose both i and j; its diagonal is the load.
        top_k: k.
    """
    tokens = float(np.trace(pairs_NN)) / top_k
    if top_k < 2 or tokens == 0:
        return None
    each = np.diag(pairs_NN) / tokens
    chance = np.outer(each, each)
    np.fill_diagonal(chance, 0.0)
    chance *= top_k * (top_k - 1) / chance.sum()
    seen = pairs_NN / tokens - np.diag(each)
    found = float(np.abs(seen - chance).sum() / chance.sum())
    return found if math.isfinite(found) else None
