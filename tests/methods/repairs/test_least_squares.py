"""Least-squares repair against numpy.linalg.lstsq, and what it promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import PADDING, ExpertWeights, FfnWeights, LayerInputs
from llamamoe.methods.moe_layer import ConvertedFfn
from llamamoe.methods.repairs import least_squares
from llamamoe.methods.repairs.least_squares import LeastSquares
from llamamoe.methods.solvers.normal_equations import blocks
from llamamoe.numerics import solve_ridge
from tests.converted import (
    EXPERTS,
    HIDDEN,
    make_context,
    make_ffn,
    make_inputs,
    make_moe,
    make_partition,
    plain_dense,
    plain_error,
    plain_weighted_hidden,
)

CASES = {
    "hard": {},
    "hard, not 1": {"factor": 7.0},
    "soft renormalised": {"scale": "soft", "weighting": "renormalised", "factor": 2.0},
    "soft softmax": {"scale": "soft"},
    "soft sigmoid": {"scale": "soft", "weighting": "sigmoid", "factor": 2.0},
}


def reference(
    moe: ConvertedFfn,
    ffn: FfnWeights,
    inputs: LayerInputs,
    ridge: float,
    scale_T: np.ndarray | None = None,
    penalty: str = "mean",
    places: slice = slice(None),
) -> np.ndarray:
    """float64 ``[H, P]``: ridge regression as stacked rows, on real places that are ever active; others are fixed."""
    scale_T = np.ones(inputs.num_tokens) if scale_T is None else scale_T
    h = plain_weighted_hidden(moe, inputs.x_TH) * scale_T[:, None]
    y = plain_dense(ffn, inputs.x_TH) * scale_T[:, None]
    asked = np.zeros(h.shape[1], bool)
    asked[places] = True
    kept = np.flatnonzero((h != 0).any(0) & (moe.partition.slots != PADDING) & asked)
    power = np.array([h[:, p] @ h[:, p] for p in kept])
    lower_median = np.sort(power)[(len(power) - 1) // 2]
    unit = {"mean": power.mean() + 0 * power, "median": lower_median + 0 * power, "balanced": np.sqrt(lower_median * power)}  # fmt: skip
    pull = np.diag(np.sqrt(ridge * unit[penalty]))
    down = moe.weights.down_HP.double().numpy().copy()
    y = y - h[:, ~asked] @ down[:, ~asked].T
    rows = np.vstack([h[:, kept], pull])
    aim = np.vstack([y, pull @ down[:, kept].T])
    down[:, kept] = np.linalg.lstsq(rows, aim, rcond=None)[0].T
    return down


def repaired(moe: ConvertedFfn, ffn: FfnWeights, inputs: LayerInputs, **options: object) -> ExpertWeights:
    return LeastSquares(LeastSquares.Options.model_validate(options)).repair(moe, ffn, make_context(moe, inputs))


@pytest.mark.parametrize("kind", ["plain", "padded", "overlap"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ridge", [1e-4, 0.01])
def test_solves_the_ridge_problem(kind: str, case: str, ridge: float) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind), **CASES[case])
    out = repaired(moe, ffn, inputs, ridge=ridge)
    expected = reference(moe, ffn, inputs, ridge)
    np.testing.assert_allclose(out.down_HP.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected - moe.weights.down_HP.numpy()).max() > 0.1
    assert torch.equal(out.gate_PH, moe.weights.gate_PH)
    assert torch.equal(out.up_PH, moe.weights.up_PH)
    assert not out.down_HP[:, moe.partition.slots == PADDING].any()


@pytest.mark.parametrize("penalty", ["median", "balanced"])
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_other_penalties(penalty: str, kind: str) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind))
    out = repaired(moe, ffn, inputs, ridge=0.3, penalty=penalty)
    expected = reference(moe, ffn, inputs, 0.3, penalty=penalty)
    np.testing.assert_allclose(out.down_HP.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected - reference(moe, ffn, inputs, 0.3)).max() > 0.01


def test_auto_takes_the_strength_that_is_best_on_held_out_tokens() -> None:
    """Every fifth run of tokens is held out; then all tokens are fitted, with as much ridge per token less."""
    ffn, inputs = make_ffn(), make_inputs(400)
    moe = make_moe(ffn)
    held_out = np.arange(400) // 10 % 5 == 4
    parts = [replace(inputs, x_TH=inputs.x_TH[rows], residual_scale_T=inputs.residual_scale_T[rows]) for rows in (~held_out, held_out)]  # fmt: skip
    strengths = [0.3 * 10 ** (step / 2) for step in range(-6, 7)]
    errors = []
    for ridge in strengths:
        down = torch.from_numpy(reference(moe, ffn, parts[0], ridge))
        errors.append((plain_error(moe, ffn, parts[1].x_TH, down) ** 2).sum())
    best = strengths[int(np.argmin(errors))]
    power = [(plain_weighted_hidden(moe, x.x_TH) ** 2).sum() for x in (parts[0], inputs)]
    expected = reference(moe, ffn, inputs, best * power[0] / power[1])
    np.testing.assert_allclose(repaired(moe, ffn, inputs, ridge="auto").down_HP.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert 0 < int(np.argmin(errors)) < len(strengths) - 1


@pytest.mark.parametrize("penalty", ["mean", "median", "balanced"])
def test_auto_is_no_worse_than_no_repair_on_other_text(penalty: str) -> None:
    """With fewer tokens than places a weak ridge fits noise."""
    ffn, inputs, others = make_ffn(), make_inputs(25), make_inputs(500, seed=7)
    moe = make_moe(ffn)
    weak, auto = (
        plain_error(moe, ffn, others.x_TH, repaired(moe, ffn, inputs, ridge=ridge, penalty=penalty).down_HP)
        for ridge in (1e-4, "auto")
    )
    before = (plain_error(moe, ffn, others.x_TH, moe.weights.down_HP) ** 2).sum()
    assert (auto**2).sum() <= before < (weak**2).sum()


@pytest.mark.parametrize("ridge", [0, -1.0, 1e-7, float("inf"), float("nan"), "other"])
def test_ridge_must_be_positive(ridge: object) -> None:
    with pytest.raises(ValueError, match="ridge"):
        LeastSquares.Options.model_validate({"ridge": ridge})


def test_second_pass_starts_from_the_weights_it_is_given() -> None:
    """Weights that are no longer the parent's are both what is computed with and what the ridge pulls to."""
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    g = torch.Generator().manual_seed(5)
    real = torch.from_numpy(moe.partition.slots != PADDING).float()
    noisy = ExpertWeights(
        moe.weights.gate_PH + 0.3 * torch.randn(moe.weights.gate_PH.shape, generator=g) * real[:, None],
        moe.weights.up_PH,
        moe.weights.down_HP + 0.3 * torch.randn(moe.weights.down_HP.shape, generator=g) * real,
    )
    moe = replace(moe, weights=noisy)
    expected = reference(moe, ffn, inputs, 0.01)
    np.testing.assert_allclose(repaired(moe, ffn, inputs, ridge=0.01).down_HP.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_tokens_weighted_by_their_residual_stream() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    scale = 1 / inputs.residual_scale_T.double().numpy()
    out = repaired(moe, ffn, inputs, ridge=0.01, weighting="residual")
    expected = reference(moe, ffn, inputs, 0.01, scale)
    np.testing.assert_allclose(out.down_HP.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected - reference(moe, ffn, inputs, 0.01)).max() > 0.05


@pytest.mark.parametrize("kind", ["padded", "overlap"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 7, 40, 200])
def test_never_worse_than_no_repair_on_its_own_tokens(kind: str, case: str, tokens: int) -> None:
    ffn, inputs = make_ffn(1), make_inputs(tokens, seed=1)
    moe = make_moe(ffn, make_partition(kind), **CASES[case])
    for ridge in (1e-6, 0.002, 10.0, "auto"):
        after = plain_error(moe, ffn, inputs.x_TH, repaired(moe, ffn, inputs, ridge=ridge).down_HP)
        before = plain_error(moe, ffn, inputs.x_TH, moe.weights.down_HP)
        assert (after**2).sum() <= (before**2).sum() * (1 + 1e-6)


def test_changes_nothing_where_nothing_is_wrong() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, top_k=EXPERTS)
    for ridge in (0.002, "auto"):
        assert torch.equal(repaired(moe, ffn, inputs, ridge=ridge).down_HP, moe.weights.down_HP)


@pytest.mark.parametrize("ridge", [0.002, "auto"])
@pytest.mark.parametrize("weighting", ["none", "residual"])
def test_batches_do_not_matter(weighting: str, ridge: object) -> None:
    ffn = make_ffn()
    moe = make_moe(ffn)
    a, b = (repaired(moe, ffn, make_inputs(200, size), ridge=ridge, weighting=weighting).down_HP for size in (7, 1000))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    rows = moe.router_NH.clone()
    inputs.x_TH[:, 0] = 1.0
    rows[2] = 0.0
    rows[2, 0] = -1e3
    moe = replace(moe, router_NH=rows)
    out = repaired(moe, ffn, inputs).down_HP
    start = len(moe.partition.shared) + 2 * moe.partition.experts.shape[1]
    width = moe.partition.experts.shape[1]
    assert torch.equal(out[:, start : start + width], moe.weights.down_HP[:, start : start + width])
    expected = reference(moe, ffn, inputs, 0.002)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_no_tokens_no_repair() -> None:
    ffn = make_ffn()
    moe = make_moe(ffn)
    for ridge in (0.002, "auto"):
        assert torch.equal(repaired(moe, ffn, make_inputs(0), ridge=ridge).down_HP, moe.weights.down_HP)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_no_number_names_the_layer(bad: float) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    inputs.x_TH[5, 2] = bad
    moe = make_moe(ffn)
    with pytest.raises(LlamaMoeError, match="layer 3"):
        repaired(moe, ffn, inputs)


def test_a_gram_spoilt_by_rounding_is_solved_on_what_it_can_be() -> None:
    g = np.random.default_rng(0)
    vectors = np.linalg.qr(g.normal(size=(6, 6)))[0]
    gram = vectors @ np.diag([3.0, 2.0, 1.0, 0.5, 0.0, -1e-3]) @ vectors.T
    right = g.normal(size=(6, HIDDEN))
    plain = vectors @ np.diag(1 / np.array([3.0001, 2.0001, 1.0001, 0.5001, 1e-4, 1e-4])) @ vectors.T @ right
    found = solve_ridge(torch.from_numpy(gram.copy()), torch.from_numpy(right), 1e-4)
    np.testing.assert_allclose(found.numpy(), plain, rtol=1e-6)


def test_memory_estimate_covers_the_two_grams() -> None:
    assert LeastSquares.working_bytes(1000, 10) >= 2 * 8 * 1000**2


@pytest.mark.parametrize(("kind", "most"), [("padded", 11), ("padded", 3), ("plain", 12), ("plain", 1)])
def test_a_wide_layer_is_refitted_block_after_block(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind))
    joint = repaired(moe, ffn, inputs)
    parts = blocks(moe.partition, most)
    assert len(parts) > 1
    covered = [place for part in parts for place in range(part.places.start, part.places.stop)]
    assert covered == list(range(len(moe.partition.slots)))
    monkeypatch.setattr(least_squares, "MOST_PLACES", most)
    found = repaired(moe, ffn, inputs)
    want = moe
    for part in parts:
        down = torch.from_numpy(reference(want, ffn, inputs, 0.002, places=part.places)).float()
        want = replace(want, weights=replace(want.weights, down_HP=down))
    np.testing.assert_allclose(found.down_HP.numpy(), want.weights.down_HP.numpy(), rtol=1e-3, atol=1e-4)
    errors = [np.square(plain_error(moe, ffn, inputs.x_TH, each.down_HP)).sum() for each in (joint, found, moe.weights)]
    assert errors == sorted(errors)
