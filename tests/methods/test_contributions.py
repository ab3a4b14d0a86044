"""Contributions and a router's quality, against plain loops over tokens and experts."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch

from llamamoe.methods.contributions import contributions, router_quality
from llamamoe.methods.layer import ExpertWeights
from tests.converted import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    make_ffn,
    make_inputs,
    make_moe,
    make_partition,
    plain_expert_weights,
)
from tests.methods.routers.test_ridge import plain_contributions


@pytest.mark.parametrize("kind", ["norm", "power"])
@pytest.mark.parametrize("partition", ["plain", "padded", "overlap"])
@pytest.mark.parametrize("batch_tokens", [9, 100])
def test_contributions(kind: str, partition: str, batch_tokens: int) -> None:
    ffn, inputs, placed = make_ffn(), make_inputs(40, batch_tokens), make_partition(partition)
    weights = ExpertWeights.of_parent(ffn, placed)
    expected = plain_contributions(weights, placed, inputs.x_TH, kind)
    for source in (ffn, weights):
        batches = list(contributions(source, placed, inputs, kind=kind))
        assert [len(b) for b in batches] == [len(x) for x in inputs.inputs()]
        np.testing.assert_allclose(torch.cat(batches).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_contributions_of_changed_weights() -> None:
    ffn, inputs, placed = make_ffn(), make_inputs(40), make_partition()
    weights = ExpertWeights.of_parent(ffn, placed)
    weights = replace(weights, down_HP=weights.down_HP * torch.linspace(0, 3, weights.down_HP.shape[1]))
    expected = plain_contributions(weights, placed, inputs.x_TH, "norm")
    found = torch.cat(list(contributions(weights, placed, inputs)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["norm", "power"])
def test_quality_against_loops(kind: str) -> None:
    ffn, inputs = make_ffn(), make_inputs(90)
    moe = make_moe(ffn)
    scores = plain_contributions(moe.weights, moe.partition, inputs.x_TH, kind)
    weights = plain_expert_weights(moe, inputs.x_TH)
    hits = held = best = total = share = 0.0
    load = np.zeros(EXPERTS)
    for t in range(90):
        chosen = {i for i in range(EXPERTS) if weights[t, i] > 0}
        oracle = set(sorted(range(EXPERTS), key=lambda i: -scores[t, i])[:TOP_K])
        hits += len(chosen & oracle) / TOP_K
        held += sum(scores[t, i] for i in chosen)
        best += sum(scores[t, i] for i in oracle)
        share += sum(scores[t, i] for i in chosen) / sum(scores[t, i] for i in oracle)
        total += scores[t].sum()
        for i in chosen:
            load[i] += 1
    p = load / load.sum()
    expected = {
        "recall_at_k": hits / 90,
        "chance_recall": TOP_K / EXPERTS,
        "captured": held / best,
        "captured_by_chance": total * TOP_K / EXPERTS / best,
        "captured_per_token": share / 90,
        "load_max_over_mean": load.max() / load.mean(),
        "entropy": -sum(q * log(q) for q in p) / log(EXPERTS),
        "dead_experts": 0,
    }
    assert router_quality(moe, ffn, inputs, kind=kind) == pytest.approx(expected, rel=1e-4)


def test_a_router_that_is_the_oracle_is_perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    scores = contributions(ffn, moe.partition, inputs)
    plain = type(moe).expert_weights
    monkeypatch.setattr(type(moe), "expert_weights", lambda self, x: plain(self, x, next(scores)))
    found = router_quality(moe, ffn, inputs)
    assert found["recall_at_k"] == found["captured_per_token"] == 1.0
    assert found["captured"] == pytest.approx(1.0)


def test_chance_is_what_random_routers_reach() -> None:
    ffn, inputs = make_ffn(), make_inputs(100)
    found = [router_quality(make_moe(ffn, seed=seed), ffn, inputs) for seed in range(40)]
    assert np.mean([f["recall_at_k"] for f in found]) == pytest.approx(found[0]["chance_recall"], abs=0.06)
    assert np.mean([f["captured"] for f in found]) == pytest.approx(found[0]["captured_by_chance"], abs=0.06)


def test_a_router_that_always_says_the_same() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    inputs.x_TH[:, 0] = 1.0
    rows = torch.zeros(EXPERTS, HIDDEN)
    rows[:, 0] = torch.arange(EXPERTS)
    found = router_quality(make_moe(ffn, router_NH=rows), ffn, inputs)
    assert found["dead_experts"] == EXPERTS - TOP_K
    assert found["load_max_over_mean"] == pytest.approx(EXPERTS / TOP_K)
    assert found["entropy"] == pytest.approx(log(TOP_K) / log(EXPERTS))


def test_no_tokens_no_quality() -> None:
    ffn = make_ffn()
    with pytest.raises(ValueError, match="at least one token"):
        router_quality(make_moe(ffn), ffn, make_inputs(0))
