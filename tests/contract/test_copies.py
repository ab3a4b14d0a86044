"""Upcycled models compute what their parent computes, in plain transformers, at every top-k of whole copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llamamoe
from llamamoe.architectures.targets import TARGETS
from tests.dense import FFN_TARGETS, make_dense, variant_for

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A one-layer model that the target can hold."""
    folder = tmp_path_factory.mktemp("copies")
    made: dict[str, Path] = {}

    def get(target: str) -> Path:
        variant = variant_for(target)
        if variant not in made:
            made[variant] = make_dense(folder / variant, variant, num_hidden_layers=1)
        return made[variant]

    return get


def logits(folder: Path, **keys: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **keys)
    with torch.no_grad():
        return model(IDS).logits


def check_every_top_k(source: Path, out: Path, step: int, **given: Any) -> None:
    """One file, run with k = step, 2 step, .. N, differs from its parent by rounding only."""
    plan = llamamoe.split(source, out, llamamoe.load_recipe(given=given), verify=False).plan
    assert plan.parity == "exact"
    parent = logits(source)
    for top_k in range(step, plan.layout.num_experts + 1, step):
        found = logits(out, **{plan.target.top_k_key: top_k})
        assert float((found - parent).abs().max() / parent.abs().max()) < 1e-5, top_k


@pytest.mark.parametrize("target", FFN_TARGETS)
def test_copies_of_the_whole_ffn(sources: Any, tmp_path: Path, target: str) -> None:
    given = {"method": "upcycle", "num_experts": 4, "top_k": 2, "target": target}
    check_every_top_k(sources(target), tmp_path / "out", 1, **given)


@pytest.mark.parametrize("target", FFN_TARGETS)
def test_copies_of_parts_are_picked_in_whole_sets(sources: Any, tmp_path: Path, target: str) -> None:
    """Beside shared neurons where the target has any; with soft weights, which the copies cancel."""
    method = {"name": "upcycle", "groups": 2}
    shared = 0 if TARGETS.get(target).shared == "none" else "1x"
    given = {"num_experts": 6, "top_k": 2, "router_scale": "soft", "shared": shared}
    check_every_top_k(sources(target), tmp_path / "out", 2, method=method, target=target, **given)


def test_verification_runs_copies_at_their_own_top_k(sources: Any, tmp_path: Path) -> None:
    given = {"method": {"name": "upcycle", "groups": 2}, "num_experts": 4, "top_k": 2, "router_scale": "soft"}
    receipt = llamamoe.split(sources(""), tmp_path / "out", llamamoe.load_recipe(given=given)).receipt["verification"]
    assert receipt["equal_weights"] < 1e-5
    assert receipt["as_stored"] < 1e-5
    assert receipt["neurons_checked"] == 1
    assert receipt["kept"] == "neurons"


def test_renewed_neurons_end_exactness(sources: Any, tmp_path: Path) -> None:
    given = {"method": {"name": "upcycle", "reinit": 0.5}, "num_experts": 2, "top_k": 1}
    result = llamamoe.split(sources(""), tmp_path / "out", llamamoe.load_recipe(given=given))
    found = result.receipt["verification"]
    assert (result.plan.parity, found["kept"], found["equal_weights"]) == ("none", "nothing", None)
    assert found["as_configured"] > 1e-3
    assert found["passed"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_experts": 5, "top_k": 2, "router_scale": "soft"}, "multiples of groups = 2"),
        ({"num_experts": 4, "top_k": 3, "router_scale": "soft"}, "multiples of groups = 2"),
        ({"num_experts": 4, "top_k": 2}, "--router-scale soft"),
        ({"num_experts": 4, "top_k": 4, "router_scale": "soft", "rescale": "unit"}, "--rescale mean"),
    ],
)
def test_what_would_not_average_whole_copies_is_refused(
    sources: Any, tmp_path: Path, given: dict[str, Any], reason: str
) -> None:
    recipe = llamamoe.load_recipe(given={"method": {"name": "upcycle", "groups": 2}, **given})
    with pytest.raises(llamamoe.RefusedError, match=reason):
        llamamoe.plan_conversion(sources(""), recipe)


def test_copies_cost_more_than_the_parent(sources: Any) -> None:
    recipe = llamamoe.load_recipe(given={"method": "upcycle", "num_experts": 4, "top_k": 2, "pad_to": 8})
    plan = llamamoe.plan_conversion(sources(""), recipe)
    ffn = 3 * 64 * 176  # 172 neurons, padded
    assert plan.cost.total["routed"] == 4 * ffn
    assert plan.cost.active["routed"] == 2 * ffn
    assert plan.padding_per_layer == 4 * 4
