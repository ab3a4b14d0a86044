"""Statistics against numpy, over micro-batches and ranks; what a collapse looks like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.training.routing import Routing
from llamamoe.training.routing_statistics import LayerStatistics, RoutingStatistics, collapsed

from .tiny_moe import fake_layer


def routing(layer: int, seed: int, tokens: int = 20, n: int = 5, **extra: Any) -> Routing:
    logits = 2 * torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    values, indices = logits.topk(2, dim=-1)
    return Routing(fake_layer(n, layer=layer), logits, values.softmax(-1), indices, **extra)


def statistics(num_layers: int = 1, n: int = 5, **keys: Any) -> RoutingStatistics:
    return RoutingStatistics([fake_layer(n, layer=layer) for layer in range(num_layers)], **keys)


def test_every_number_against_numpy() -> None:
    dropped = torch.rand(20, 2, generator=torch.Generator().manual_seed(9)) < 0.2
    given_ = [routing(0, 0), routing(0, 1, dropped_Tk=dropped)]
    found = statistics()
    for each in given_:
        found.add([each])
    layer = found.per_layer()[0]
    load, importance, entropy, top1, selected = np.zeros(5), np.zeros(5), [], [], []
    for each in given_:
        for t in range(20):
            p = np.exp(each.logits_TN[t].numpy().astype(float))
            p /= p.sum()
            entropy.append(-(p * np.log(p)).sum())
            top1.append(p.max())
            selected.append(p[each.indices_Tk[t].numpy()].sum())
            for j in range(2):
                expert = int(each.indices_Tk[t, j])
                importance[expert] += float(each.weights_Tk[t, j])
                load[expert] += each.dropped_Tk is None or not bool(each.dropped_Tk[t, j])
    relative, shares = load / load.mean(), load / load.sum()
    assert layer.load == tuple(load)
    assert layer.importance == pytest.approx(tuple(importance), rel=1e-6)
    assert layer.tokens == 40
    assert layer.dropped == float(dropped.sum())
    assert layer.dropped_share == pytest.approx(float(dropped.sum()) / 80)
    assert layer.max_violation == pytest.approx(relative.max() - 1)
    assert layer.mean_violation == pytest.approx(np.abs(relative - 1).mean())
    assert layer.load_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert layer.load_entropy_share == pytest.approx(layer.load_entropy / math.log(5))
    assert layer.router_entropy == pytest.approx(np.mean(entropy), rel=1e-6)
    assert layer.router_entropy_share == pytest.approx(np.mean(entropy) / math.log(5), rel=1e-6)
    assert layer.top1_probability == pytest.approx(np.mean(top1), rel=1e-6)
    assert layer.selected_probability == pytest.approx(np.mean(selected), rel=1e-6)
    assert layer.importance_cv == pytest.approx(importance.std() / importance.mean(), rel=1e-6)
    assert layer.dead_experts == (load == 0).sum()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99))
def test_micro_batches_add_up(sizes: list[int], seed: int) -> None:
    whole = routing(0, seed, tokens=sum(sizes))
    together, apart = statistics(), statistics()
    together.add([whole])
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        part = Routing(whole.moe, whole.logits_TN[rows], whole.weights_Tk[rows], whole.indices_Tk[rows])
        apart.add([part])
        start += size
    assert apart.per_layer()[0].load == together.per_layer()[0].load
    for key, value in together.summary().items():
        assert apart.summary()[key] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_ranks_add_up_even_if_one_saw_nothing() -> None:
    alone = [statistics(2), statistics(2)]
    alone[0].add([routing(0, 1), routing(1, 2)])
    tables: list[torch.Tensor] = []

    def record(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return table

    for each in alone:
        each._all_reduce = record
        each.per_layer()
    both = statistics(2, all_reduce=lambda _: tables[0] + tables[1])
    assert [layer.load for layer in both.per_layer()] == [layer.load for layer in alone[0].per_layer()]


def test_the_summary_groups_layers_by_thirds() -> None:
    found = statistics(7)
    found.add([routing(layer, layer) for layer in range(7)])
    layers, summary = found.per_layer(), found.summary()
    values = [layer.max_violation for layer in layers]
    assert summary["max_violation/first"] == pytest.approx(np.mean(values[:3]))
    assert summary["max_violation/middle"] == pytest.approx(np.mean(values[3:5]))
    assert summary["max_violation/last"] == pytest.approx(np.mean(values[5:]))
    assert summary["max_violation/mean"] == pytest.approx(np.mean(values))
    assert summary["max_violation/worst"] == max(values)
    assert summary["load_entropy/worst"] == min(layer.load_entropy for layer in layers)
    assert all(isinstance(value, float) and math.isfinite(value) for value in summary.values())


def test_few_layers_have_no_empty_groups_and_a_reset_forgets() -> None:
    found = statistics(1)
    found.add([routing(0, 0)])
    assert {key.split("/")[1] for key in found.summary()} == {"first", "mean", "worst"}
    found.reset()
    assert found.summary() == {}
    assert found.per_layer() == []
    found.add([routing(0, 0)])
    assert found.per_layer()[0].tokens == 20


def test_layers_of_different_sizes() -> None:
    found = RoutingStatistics([fake_layer(5, layer=0), fake_layer(3, layer=2)])
    found.add([routing(0, 0), routing(2, 1, n=3)])
    assert [layer.num_experts for layer in found.per_layer()] == [5, 3]
    assert sum(found.per_layer()[1].importance) == pytest.approx(20, rel=1e-6)


def layer(load: list[float], top_k: int = 2) -> LayerStatistics:
    tokens = sum(load) / top_k
    return LayerStatistics(3, top_k, tokens, tuple(load), tuple(load), 1.0, 0.5, 0.5, 0.0)


def test_a_collapsed_router_is_named() -> None:
    found = collapsed([layer([50, 50, 0, 0, 0, 0, 0, 0])])
    assert len(found) == 1
    assert "layer 3" in found[0]
    assert "6 of 8 experts" in found[0]
    assert collapsed([layer([500, 490, 5, 5, 5, 5, 5, 5])])  # nobody is dead, but nearly
    assert collapsed([layer([1, 1, 1, 0, 0, 0, 0, 0])])


def test_balance_or_many_selected_experts_are_no_collapse() -> None:
    assert collapsed([layer([25] * 8)]) == []
    assert collapsed([layer([40, 30, 20, 10, 8, 6, 4, 2])]) == []
    assert collapsed([layer([5] * 4, top_k=4)]) == []
    assert layer([25] * 8).spread == pytest.approx(1)
    assert layer([50, 50, 0, 0]).spread == pytest.approx(0)


def test_a_router_of_many_of_many_that_always_selects_the_same_is_seen() -> None:
    """44 of 88: the entropy of its load is still 85 % of log 88."""
    stuck = layer([10.0] * 44 + [0.0] * 44, top_k=44)
    assert stuck.load_entropy_share > 0.8
    assert collapsed([stuck])
