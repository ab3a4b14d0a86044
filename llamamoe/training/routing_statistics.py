"""Compute routing statistics of a window of training steps: load, importance, entropy, dead experts, drops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..lazy import torch
from ..numerics import wide
from .moe_layers import MoeLayer
from .routing import Routing

_SCALARS = 5
"""Number of sums per layer beside load and importance: tokens, router entropy, top-1, selected probability, dropped."""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer over the window. Entropies are in nats; shares of them are relative to log N.

    Attributes:
        layer: Index of the decoder layer.
        top_k: k.
        tokens: Number of tokens.
        load: Assignments per expert, without dropped ones.
        importance: Sum of the weights per expert.
        router_entropy: Mean over tokens of the entropy of the router's probabilities: log N of a hard router.
        top1_probability: Mean over tokens of the largest probability.
        selected_probability: Mean over tokens of the sum of the selected experts' probabilities.
        dropped: Number of dropped assignments.
        part: See `llamamoe.training.moe_layers.MoeLayer`.
    """

    layer: int
    top_k: int
    tokens: float
    load: tuple[float, ...]
    importance: tuple[float, ...]
    router_entropy: float
    top1_probability: float
    selected_probability: float
    dropped: float
    part: str = "ffn"

    @property
    def num_experts(self) -> int:
        """N, the number of experts."""
        return len(self.load)

    @property
    def max_violation(self) -> float:
        """Largest load over the mean load, minus 1: 0 at perfect balance, at most N/k - 1 without drops."""
        return max(self._relative_load) - 1

    @property
    def mean_violation(self) -> float:
        """Mean distance of a load from the mean load, relative to it."""
        return sum(abs(each - 1) for each in self._relative_load) / self.num_experts

    @property
    def load_entropy(self) -> float:
        """Entropy of the load over experts: log N at perfect balance, log k if all tokens go to the same k."""
        shares = [each / self.num_experts for each in self._relative_load]
        return -sum(share * math.log(share) for share in shares if share > 0)

    @property
    def load_entropy_share(self) -> float:
        """`load_entropy` relative to log N."""
        return self._share(self.load_entropy)

    @property
    def router_entropy_share(self) -> float:
        """`router_entropy` relative to log N."""
        return self._share(self.router_entropy)

    @property
    def spread(self) -> float:
        """0 if all tokens go to the same k experts, 1 at perfect balance: ``(exp(load_entropy) - k) / (N - k)``.

        With many of N selected the entropy of the load stays near log N for any router; this measure does not.
        """
        if self.num_experts == self.top_k:
            return 1.0
        return (math.exp(self.load_entropy) - self.top_k) / (self.num_experts - self.top_k)

    @property
    def dead_experts(self) -> float:
        """Number of experts without any assignment in the window."""
        return float(sum(each == 0 for each in self.load))

    @property
    def dropped_share(self) -> float:
        """Dropped assignments as a share of all."""
        return self.dropped / (self.tokens * self.top_k) if self.tokens else 0.0

    @property
    def importance_cv(self) -> float:
        """Coefficient of variation of the importance: standard deviation over mean."""
        mean = sum(self.importance) / self.num_experts
        variance = sum((each - mean) ** 2 for each in self.importance) / self.num_experts
        return math.sqrt(variance) / mean if mean else 0.0

    @property
    def _relative_load(self) -> list[float]:
        mean = sum(self.load) / self.num_experts
        return [each / mean if mean else 1.0 for each in self.load]

    def _share(self, entropy: float) -> float:
        return entropy / math.log(self.num_experts) if self.num_experts > 1 else 1.0


class RoutingStatistics:
    """Sums over micro-batches; O(L N) memory, without synchronisation with the device until they are read.

    Args:
        layers: The layers of the routings.
        all_reduce: Sums a tensor over ranks (`ranks.sum_over_ranks`). With it,
            `per_layer` and `summary` are collective calls: every rank must make them. None: this rank alone.
    """

    worst: ClassVar[dict[str, Callable[[Sequence[float]], float]]] = {
        "max_violation": max,
        "mean_violation": max,
        "importance_cv": max,
        "load_entropy": min,
        "load_entropy_share": min,
        "spread": min,
        "router_entropy": min,
        "router_entropy_share": min,
        "dead_experts": max,
        "dropped_share": max,
        "top1_probability": max,
        "selected_probability": max,
    }
    """The metrics of `summary`, and the worse end of their range (for confidences: the harder router)."""

    def __init__(
        self, layers: Sequence[MoeLayer], all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.layers = sorted(layers, key=lambda moe: moe.place)
        self._all_reduce = all_reduce
        self._sums: dict[tuple[int, str], torch.Tensor] = {}

    def add(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch. O(T N) per layer, on its own device."""
        with torch.no_grad():
            for routing in routings:
                sums = _sums(routing)
                before = self._sums.get(routing.moe.place)
                self._sums[routing.moe.place] = sums if before is None else before.add_(sums)

    def reset(self) -> None:
        """Start a new window."""
        self._sums = {}

    def per_layer(self) -> list[LayerStatistics]:
        """Return every layer with routings (on any rank), in order of depth."""
        width = max(moe.num_experts for moe in self.layers)
        table = torch.zeros(len(self.layers), 2 * width + _SCALARS, dtype=torch.float64)
        for row, moe in zip(table, self.layers, strict=True):
            if moe.place in self._sums:
                found = self._sums[moe.place].cpu().double()
                row[: len(found)] = found
        if self._all_reduce is not None:
            device = self.layers[0].router_NH.device
            table = self._all_reduce(table.to(device)).cpu()
        rows = zip(self.layers, table.tolist(), strict=True)
        return [_layer_statistics(moe, row) for moe, row in rows if row[0] > 0]

    def summary(self) -> dict[str, float]:
        """Return flat numbers for a log, ``"<metric>/<group>"``; empty without routings.

        Groups: first, middle and last (a third of the layers, omitted if empty), mean and worst.
        """
        layers = self.per_layer()
        found: dict[str, float] = {}
        for metric, worst in self.worst.items():
            values = [float(getattr(layer, metric)) for layer in layers]
            for group, members in _groups(values).items():
                found[f"{metric}/{group}"] = sum(members) / len(members)
            if values:
                found[f"{metric}/worst"] = worst(values)
        return found


def collapsed(
    statistics: RoutingStatistics | Sequence[LayerStatistics], *, least_spread: float = 0.1, most_dead: float = 0.5
) -> list[str]:
    """Return a sentence for each layer whose router sends nearly all tokens to the same experts.

    Args:
        statistics: Statistics of a window with enough tokens for every expert to be chosen (many more than N/k).
        least_spread: `LayerStatistics.spread` below which a router counts as collapsed.
        most_dead: Share of dead experts above which it also does.
    """
    layers = statistics.per_layer() if isinstance(statistics, RoutingStatistics) else statistics
    found = []
    for each in layers:
        dead = each.dead_experts
        if each.spread < least_spread or dead > most_dead * each.num_experts:
            used = math.exp(each.load_entropy)
            whose = "of attention " if each.part == "attention" else ""
            found.append(
                f"layer {each.layer}: the router {whose}has collapsed: {dead:.0f} of {each.num_experts} experts got no token, "
                f"and the load is spread as over {used:.1f} experts (at least {each.top_k} are selected)"
            )
    return found


def _sums(routing: Routing) -> torch.Tensor:
    """Return one vector: tokens, the other scalars, then load and importance per expert."""
    probabilities_TN = routing.probabilities_TN
    weights = routing.weights_Tk.reshape(-1).float()
    importance_N = torch.zeros(routing.moe.num_experts, device=weights.device)
    importance_N.scatter_add_(0, routing.indices_Tk.reshape(-1), weights)
    dropped = routing.dropped_Tk
    scalars = torch.stack(
        [
            torch.full_like(importance_N[0], routing.num_tokens),
            torch.special.entr(probabilities_TN).sum(),
            probabilities_TN.amax(-1).sum(),
            probabilities_TN.gather(-1, routing.indices_Tk).sum(),
            torch.zeros_like(importance_N[0]) if dropped is None else dropped.sum().to(importance_N.dtype),
        ]
    )
    sums = torch.cat([scalars, routing.counts_N(), importance_N])
    return wide(sums)


def _layer_statistics(moe: MoeLayer, row: list[float]) -> LayerStatistics:
    tokens, entropy, top1, selected, dropped = row[:_SCALARS]
    n = moe.num_experts
    load, importance = row[_SCALARS : _SCALARS + n], row[_SCALARS + n : _SCALARS + 2 * n]
    return LayerStatistics(
        layer=moe.layer,
        top_k=moe.top_k,
        tokens=tokens,
        load=tuple(load),
        importance=tuple(importance),
        router_entropy=entropy / tokens,
        top1_probability=top1 / tokens,
        selected_probability=selected / tokens,
        dropped=dropped,
        part=moe.part,
    )


def _groups(values: list[float]) -> dict[str, list[float]]:
    n = len(values)
    cuts = [0, -(-n // 3), -(-2 * n // 3), n]
    thirds = {name: values[cuts[i] : cuts[i + 1]] for i, name in enumerate(("first", "middle", "last"))}
    return {name: members for name, members in (thirds | {"mean": values}).items() if members}
