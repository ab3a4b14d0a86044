"""Switch and GShard against slow loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.training.gates import GATES
from llamamoe.training.gates.selection import capacity, positions
from llamamoe.training.moe_layers import MoeLayer, find_moe_layers
from llamamoe.training.routing import RouterTap, Routing

from ..tiny_moe import H, N, fake_layer, tiny_moe


def layer(top_k: int, architecture: str = "mixtral", **keys: Any) -> MoeLayer:
    return find_moe_layers(tiny_moe(architecture, num_experts_per_tok=top_k, **keys))[0]


def run(moe: MoeLayer, name: str, tokens: int, seed: int, **options: Any) -> tuple[Routing, Any]:
    cls = GATES.get(name)
    gates = cls(cls.Options(**options))
    gates.attach([moe], seed)
    tap = RouterTap([moe])
    x_TH = torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed)) + 0.5
    try:
        with tap.armed() as routings, torch.no_grad():
            moe.router(x_TH)
        drawn = torch.rand(tokens, generator=gates.generator(moe, torch.device("cpu")))
    finally:
        gates.detach()
        tap.close()
    return routings[0], drawn


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.randoms())
def test_positions_count_those_served_before(experts: list[int], random: Any) -> None:
    order = list(range(len(experts)))
    for shuffled in (False, True):
        if shuffled:
            random.shuffle(order)
        served: dict[int, int] = {}
        expected = [0] * len(experts)
        for place in order:
            expected[place] = served.get(experts[place], 0)
            served[experts[place]] = expected[place] + 1
        found = positions(torch.tensor(experts), torch.tensor(order) if shuffled else None)
        assert found.tolist() == expected


def test_capacity_is_rounded_up_but_not_for_rounding_s_sake() -> None:
    assert capacity(1.25, 100, fake_layer(8, 1)) == 16  # 15.6
    assert capacity(1.1, 100, fake_layer(11, 1)) == 10
    assert capacity(1.0, 3, fake_layer(8, 1)) == 1


MOES = {"switch": layer(1), "gshard": layer(2), "gshard-groups": layer(2, "glm4_moe", n_group=3, topk_group=2)}


@settings(max_examples=25)
@given(
    st.integers(1, 40), st.integers(0, 99), st.sampled_from([0.3, 1.0, 1.25]), st.sampled_from(["order", "probability"])
)
def test_switch(tokens: int, seed: int, factor: float, priority: Any) -> None:
    moe = MOES["switch"]
    routing, _ = run(moe, "switch", tokens, seed, capacity_factor=factor, priority=priority)
    p = routing.logits_TN.softmax(-1)
    order = sorted(range(tokens), key=lambda t: -float(p[t].max())) if priority == "probability" else range(tokens)
    room, used = max(1, math.ceil(factor * tokens / N)), [0] * N
    for t in order:
        best = int(p[t].argmax())
        assert routing.indices_Tk[t].tolist() == [best]
        assert bool(routing.dropped_Tk[t, 0]) == (used[best] >= room)
        assert float(routing.weights_Tk[t, 0]) == (0.0 if used[best] >= room else 1.0)
        used[best] += 1
    assert float(routing.counts_N().max()) <= room


@settings(max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(0, 99),
    st.sampled_from([0.3, 1.0, 1.25]),
    st.sampled_from(["next", "drop"]),
    st.booleans(),
    st.sampled_from(["gshard", "gshard-groups"]),
)
def test_gshard(tokens: int, seed: int, factor: float, overflow: Any, at_random: bool, which: str) -> None:
    moe = MOES[which]
    options = {"capacity_factor": factor, "overflow": overflow, "random_second": at_random}
    routing, drawn = run(moe, "gshard", tokens, seed, **options)
    grouped = which == "gshard-groups"
    scores = routing.logits_TN.sigmoid() if grouped else routing.logits_TN.softmax(-1)
    ranking = [ranked(row, grouped) for row in scores.tolist()]
    room, used = max(1, math.ceil(factor * tokens * 2 / N - 1e-9)), [0] * N
    expected = [[(ranking[t][0], False), (ranking[t][1], False)] for t in range(tokens)]
    for t in range(tokens):
        first = ranking[t][0]
        expected[t][0] = (first, used[first] < room)
        used[first] += used[first] < room
    waiting = []
    for t in range(tokens):
        first, second = (float(scores[t, e]) for e in ranking[t][:2])
        if not at_random or 2 * second / (first + second) > float(drawn[t]):
            waiting.append(t)
    for turn in range(1, len(ranking[0]) if overflow == "next" else 2):
        for t in list(waiting):
            asked = ranking[t][turn]
            if used[asked] < room:
                used[asked] += 1
                expected[t][1] = (asked, True)
                waiting.remove(t)
    for t in range(tokens):
        assert routing.indices_Tk[t].tolist() == [e for e, _ in expected[t]]
        assert routing.dropped_Tk[t].tolist() == [not kept for _, kept in expected[t]]
        chosen = scores[t, routing.indices_Tk[t]]
        kept = torch.tensor([float(kept) for _, kept in expected[t]])
        torch.testing.assert_close(routing.weights_Tk[t], chosen / chosen.sum() * moe.factor * kept)
    assert routing.counts_N().tolist() == used
    assert routing.wanted_counts_N().sum() == 2 * tokens


def ranked(row: list[float], grouped: bool) -> list[int]:
    """Experts from best to worst; of three groups of two, the worst is shut out."""
    allowed = set(range(N))
    if grouped:
        worst = min(range(3), key=lambda g: row[2 * g] + row[2 * g + 1])
        allowed -= {2 * worst, 2 * worst + 1}
    return sorted(allowed, key=lambda e: -row[e])


def test_gshard_with_room_for_all_is_the_native_routing() -> None:
    moe = MOES["gshard"]
    routing, _ = run(moe, "gshard", 50, 1, capacity_factor=float(N))
    x_TH = torch.randn(50, H, generator=torch.Generator().manual_seed(1)) + 0.5
    _, weights, indices = moe.router(x_TH)
    assert torch.equal(routing.indices_Tk, indices)
    assert not bool(routing.dropped_Tk.any())
    torch.testing.assert_close(routing.weights_Tk, weights)


def test_dropped_tokens_get_nothing_from_experts() -> None:
    """Overflowing tokens come out of a mixtral block as zero."""
    moe = layer(1)
    cls = GATES.get("switch")
    gates = cls(cls.Options(capacity_factor=0.5))
    gates.attach([moe], 0)
    tap = RouterTap([moe])
    x = torch.randn(1, 30, H, generator=torch.Generator().manual_seed(0))
    with tap.armed() as routings:
        out = moe.block(x)[0]
    dropped = routings[0].dropped_Tk[:, 0]
    assert 0 < int(dropped.sum()) < 30
    assert float(out[dropped].detach().abs().max()) == 0
    assert float(out[~dropped].detach().abs().amax(-1).min()) > 0


@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_gradients_flow_through_the_weights(name: str) -> None:
    moe = layer(2 if name == "gshard" else 1, "qwen2_moe", norm_topk_prob=False)
    cls = GATES.get(name)
    cls(cls.Options(capacity_factor=0.7)).attach([moe], 0)
    weights = moe.router(torch.randn(20, H))[1]
    weights.square().sum().backward()
    assert float(moe.router_NH.grad.norm()) > 0
