"""Contributions, router rows and refit of query heads, against the same written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llamamoe.methods.attention import HeadInputs, RoutedHeads, fit_output, head_contributions, head_facts, head_rows
from llamamoe.methods.layer import LayerContext, LayerInputs

G, N, D, H, T = 2, 3, 4, 10, 600


def world() -> tuple[RoutedHeads, HeadInputs, torch.Tensor, torch.Tensor]:
    """Heads whose sizes depend on the input: expert n is strong where the n-th input is large."""
    draw = torch.Generator().manual_seed(0)
    x_TH = torch.randn(T, H, generator=draw)
    heads_TGND = torch.randn(T, G, N, D, generator=draw) * x_TH[:, None, :N, None].exp()
    heads_TQ = heads_TGND.flatten(1)
    output_HQ = torch.randn(H, G * N * D, generator=draw)
    inputs = LayerInputs(x_TH, torch.ones(T), torch.device("cpu"), torch.float32, batch_tokens=250)

    def heads() -> Iterator[torch.Tensor]:
        return (heads_TQ[part] for part in inputs.batches())

    routed = RoutedHeads(torch.randn(N, H, generator=draw), output_HQ, G, 2, "hard", "renormalised", 3.0)
    return routed, HeadInputs(inputs, heads), x_TH, heads_TQ


def test_an_experts_contribution_is_the_norm_of_its_output() -> None:
    routed, _, _, heads_TQ = world()
    found = head_contributions(routed, torch.device("cpu"))(heads_TQ)
    for expert in range(N):
        columns = torch.cat([torch.arange(D) + D * (N * group + expert) for group in range(G)])
        want = (heads_TQ[:, columns] @ routed.output_HQ[:, columns].T).square().sum(1)
        assert torch.allclose(found[:, expert], want, rtol=1e-4)


def test_the_router_finds_the_experts_that_a_token_needs() -> None:
    routed, text, _, _ = world()
    rows = head_rows(routed, text, LayerContext(0, N, 2, 1, 0))
    quality = head_facts(replace(routed, router_NH=rows), routed.output_HQ, text)["attention_router_quality"]
    assert quality["recall_at_k"] > 0.85 > quality["chance_recall"]


def test_the_refit_is_the_ridge_regression_towards_the_parent() -> None:
    """With many tokens and little noise it is the least-squares solution."""
    routed, text, x_TH, heads_TQ = world()
    found = fit_output(routed, text, 0)
    z_TQ, y_TH = routed.weighted(x_TH, heads_TQ), heads_TQ @ routed.output_HQ.T
    best = torch.linalg.lstsq(z_TQ.double(), y_TH.double()).solution.T.float()

    def error(output_HQ: torch.Tensor) -> float:
        return float((y_TH - z_TQ @ output_HQ.T).square().sum() / y_TH.square().sum()) ** 0.5

    assert error(best) <= error(found.output_HQ) < 1.05 * error(best)
    assert error(found.output_HQ) < 0.9 * error(routed.output_HQ)
    told = head_facts(found, routed.output_HQ, text)["attention_error"]
    assert told == pytest.approx(error(found.output_HQ), rel=1e-4)


def test_all_heads_selected_are_the_dense_attention() -> None:
    routed, text, _, _ = world()
    everyone = replace(routed, top_k=N)
    assert head_facts(everyone, routed.output_HQ, text)["attention_error"] < 1e-5
    assert torch.allclose(fit_output(everyone, text, 0).output_HQ, routed.output_HQ, atol=1e-5)
