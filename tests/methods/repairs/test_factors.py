"""Repairs by factors against their closed forms and a brute-force search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import ExpertWeights, Partition
from llamamoe.methods.moe_layer import ConvertedFfn
from llamamoe.methods.repairs import REPAIRS
from llamamoe.methods.repairs import factors as module
from llamamoe.methods.repairs.factors import PerExpert, Scalar
from llamamoe.methods.repairs.none import NoRepair
from tests.converted import (
    EXPERTS,
    HIDDEN,
    NEURONS,
    SHARED,
    WIDTH,
    make_context,
    make_ffn,
    make_inputs,
    make_moe,
    make_partition,
    plain_dense,
    plain_error,
    plain_weighted_hidden,
)

SOFT = {"scale": "soft", "weighting": "sigmoid", "factor": 2.0}


def group_outputs(moe: ConvertedFfn, x: torch.Tensor, groups: list[range]) -> np.ndarray:
    """float64 ``[G, T H]``."""
    h, down = plain_weighted_hidden(moe, x), moe.weights.down_HP.double().numpy()
    return np.stack([(h[:, list(g)] @ down[:, list(g)].T).ravel() for g in groups])


def factors_of(after: ExpertWeights, before: ExpertWeights, groups: list[range]) -> np.ndarray:
    """The factor of each group, after checking that it is one number."""
    out = []
    for g in groups:
        old, new = before.down_HP[:, list(g)].double().numpy(), after.down_HP[:, list(g)].double().numpy()
        out.append((old * new).sum() / (old * old).sum() if old.any() else 1.0)
        np.testing.assert_allclose(new, old * out[-1], rtol=1e-5, atol=1e-6)
    return np.array(out)


ROUTED = range(SHARED, SHARED + EXPERTS * WIDTH)
EVERY = [range(SHARED), *(range(SHARED + i * WIDTH, SHARED + (i + 1) * WIDTH) for i in range(EXPERTS))]


@pytest.mark.parametrize("kind", ["padded", "overlap"])
@pytest.mark.parametrize("keys", [{}, {"factor": 10.0}, SOFT])
def test_scalar_is_the_projection_on_the_routed_output(kind: str, keys: dict[str, Any]) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind), **keys)
    shared, routed = group_outputs(moe, inputs.x_TH, [range(SHARED), ROUTED])
    y = plain_dense(ffn, inputs.x_TH).ravel()
    closed = {"routed": (y - shared) @ routed / (routed @ routed), "all": y @ (shared + routed) / ((shared + routed) ** 2).sum()}  # fmt: skip
    for part, expected in closed.items():
        options = Scalar.Options(part=part, ridge=1e-9)
        after = Scalar(options).repair(moe, ffn, make_context(moe, inputs))
        groups = [ROUTED] if part == "routed" else [range(SHARED + EXPERTS * WIDTH)]
        np.testing.assert_allclose(factors_of(after, moe.weights, groups), [expected], rtol=1e-4)
        if part == "routed":
            assert torch.equal(after.down_HP[:, :SHARED], moe.weights.down_HP[:, :SHARED])


@pytest.mark.parametrize("keys", [{}, {"factor": 10.0}, SOFT])
@pytest.mark.parametrize("weighting", ["none", "residual"])
def test_per_expert_solves_its_ridge_problem(keys: dict[str, Any], weighting: str) -> None:
    ffn, inputs, ridge = make_ffn(), make_inputs(), 0.05
    moe = make_moe(ffn, **keys)
    scale = np.ones(200) if weighting == "none" else 1 / inputs.residual_scale_T.double().numpy()
    rows = group_outputs(moe, inputs.x_TH, EVERY) * scale.repeat(HIDDEN)
    lam = ridge * np.mean((rows**2).sum(1))
    y = plain_dense(ffn, inputs.x_TH).ravel() * scale.repeat(HIDDEN)
    aim = np.concatenate([y, np.sqrt(lam) * np.ones(EXPERTS + 1)])
    expected = np.linalg.lstsq(np.vstack([rows.T, np.sqrt(lam) * np.eye(EXPERTS + 1)]), aim, rcond=None)[0]
    options = PerExpert.Options(ridge=ridge, weighting=weighting)
    after = PerExpert(options).repair(moe, ffn, make_context(moe, inputs))
    np.testing.assert_allclose(factors_of(after, moe.weights, EVERY), expected, rtol=1e-4)


def test_no_step_away_from_the_factors_helps() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    after = PerExpert(PerExpert.Options(ridge=1e-9)).repair(moe, ffn, make_context(moe, inputs))
    best = (plain_error(moe, ffn, inputs.x_TH, after.down_HP) ** 2).sum()
    assert best < (plain_error(moe, ffn, inputs.x_TH, moe.weights.down_HP) ** 2).sum() * 0.99
    for group in EVERY:
        for step in (0.97, 1.03):
            down = after.down_HP.clone()
            down[:, list(group)] *= step
            assert (plain_error(moe, ffn, inputs.x_TH, down) ** 2).sum() > best


@pytest.mark.parametrize("repair", [Scalar, PerExpert])
@pytest.mark.parametrize("keys", [{}, {"factor": 10.0}, SOFT])
@pytest.mark.parametrize("tokens", [1, 30, 200])
def test_never_worse_than_no_repair(repair: type[Scalar | PerExpert], keys: dict[str, Any], tokens: int) -> None:
    ffn, inputs = make_ffn(2), make_inputs(tokens, seed=2)
    moe = make_moe(ffn, **keys)
    after = repair().repair(moe, ffn, make_context(moe, inputs))
    errors = [(plain_error(moe, ffn, inputs.x_TH, w.down_HP) ** 2).sum() for w in (after, moe.weights)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


CLOSED_FORM = ["none", "scalar", "per_expert", "least_squares"]


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact layers stay as they are, few tokens or none are no error, batches do not matter, input is not changed."""
    repair, ffn = REPAIRS.get(name)(), make_ffn()
    exact = make_moe(ffn, top_k=EXPERTS)
    assert torch.equal(repair.repair(exact, ffn, make_context(exact, make_inputs())).down_HP, exact.weights.down_HP)
    moe = make_moe(ffn)
    before = moe.weights.down_HP.clone()
    assert torch.equal(repair.repair(moe, ffn, make_context(moe, make_inputs(0))).down_HP, before)
    wide = repair.repair(moe, ffn, make_context(moe, make_inputs(200, 1000))).down_HP
    monkeypatch.setattr(module, "OUTPUT_FLOATS", 500)
    narrow = repair.repair(moe, ffn, make_context(moe, make_inputs(200, 7))).down_HP
    torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-4)
    assert torch.equal(moe.weights.down_HP, before)
    assert repair.working_bytes(100, 10) >= 0


@pytest.mark.parametrize("name", CLOSED_FORM[1:])
def test_without_experts(name: str) -> None:
    """Static pruning: shared neurons only."""
    ffn, inputs = make_ffn(), make_inputs()
    shared = np.arange(12)
    partition = Partition(np.empty((0, 0), np.int64), shared, np.arange(12, NEURONS))
    moe = make_moe(ffn, partition, top_k=0, router_NH=torch.empty(0, HIDDEN), factor=1.0)
    after = REPAIRS.get(name)().repair(moe, ffn, make_context(moe, inputs))
    h, y = plain_weighted_hidden(moe, inputs.x_TH), plain_dense(ffn, inputs.x_TH)
    best = {
        "least_squares": np.linalg.lstsq(h, y, rcond=None)[0].T,
        "per_expert": moe.weights.down_HP.numpy() * (y * (h @ moe.weights.down_HP.numpy().T)).sum() / ((h @ moe.weights.down_HP.numpy().T) ** 2).sum(),
        "scalar": moe.weights.down_HP.numpy(),
    }  # fmt: skip
    np.testing.assert_allclose(after.down_HP.numpy(), best[name], rtol=0.05, atol=0.05)


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    inputs.x_TH[:, 0] = 1.0
    rows = moe.router_NH.clone()
    rows[1] = 0.0
    rows[1, 0] = -1e3
    moe = replace(moe, router_NH=rows)
    after = PerExpert().repair(moe, ffn, make_context(moe, inputs))
    assert torch.equal(after.down_HP[:, list(EVERY[2])], moe.weights.down_HP[:, list(EVERY[2])])
    assert not torch.equal(after.down_HP[:, list(EVERY[1])], moe.weights.down_HP[:, list(EVERY[1])])


def test_none_returns_what_it_is_given() -> None:
    ffn = make_ffn()
    moe = make_moe(ffn, factor=9.0)
    assert NoRepair().repair(moe, ffn, make_context(moe, None)) is moe.weights
    assert NoRepair.needs == "nothing"


@pytest.mark.parametrize("repair", [Scalar, PerExpert])
def test_an_activation_that_is_no_number_names_the_layer(repair: type[Scalar | PerExpert]) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    inputs.x_TH[5, 2] = float("nan")
    moe = make_moe(ffn)
    with pytest.raises(LlamaMoeError, match="layer 3"):
        repair().repair(moe, ffn, make_context(moe, inputs))
