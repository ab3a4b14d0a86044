"""CMoE's representative neurons and what becomes of its score, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamamoe.methods.layer import PADDING, FfnWeights, LayerContext, Partition
from llamamoe.methods.markers import activation_markers
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.routers.analytic import Analytic, cmoe_scores
from llamamoe.methods.splitters.random import Random
from tests.methods.splitters.calibrated import layer_context, layer_inputs, random_ffn, random_inputs

NONE = np.empty(0, np.int64)
PADDED = Partition(
    np.array([[0, 3, 5, 9], [1, 2, PADDING, PADDING], [PADDING] * 4, [4, 6, 7, 8]]), np.arange(10, 24), NONE
)
OVERLAPPING = Partition(np.array([[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9], [0, 9, 10, 11]]), np.arange(12, 24), NONE)


def plain_scores(ffn: FfnWeights, neurons: np.ndarray, x_TH: torch.Tensor) -> np.ndarray:
    """float64 [T, N]: |silu(g^ x) (u^ x)|, token by token and neuron by neuron."""
    out = np.zeros((len(x_TH), len(neurons)))
    for t, x in enumerate(x_TH.double().numpy()):
        for i, j in enumerate(neurons):
            if j != PADDING:
                g, u = (w[j].double().numpy() for w in (ffn.gate_FH, ffn.up_FH))
                z = g @ x / np.linalg.norm(g)
                out[t, i] = abs(z / (1 + np.exp(-z)) * (u @ x / np.linalg.norm(u)))
    return out


@pytest.mark.parametrize("partition", [PADDED, OVERLAPPING])
def test_representative_is_nearest_to_the_mean(partition: Partition) -> None:
    ffn, context = random_ffn(), layer_context(random_inputs(), 4)
    options = Analytic.Options(k_act=12)
    found = Analytic(options).representatives(ffn, partition, context)
    marks = activation_markers(ffn, context, options).toarray()
    for i, expert in enumerate(partition.experts):
        members = expert[expert != PADDING]
        if len(members) == 0:
            assert found[i] == PADDING
            continue
        centroid = marks[:, members].mean(1)
        distances = [np.abs(marks[:, j] - centroid).sum() for j in members]
        assert found[i] in members
        assert distances[list(members).index(found[i])] == pytest.approx(min(distances))


@pytest.mark.parametrize("partition", [PADDED, OVERLAPPING])
@pytest.mark.parametrize("form", ["gate", "up"])
def test_own_rows_at_length_one(partition: Partition, form: str) -> None:
    ffn, context = random_ffn(), layer_context(random_inputs(), 4)
    router = Analytic(Analytic.Options(form=form))
    rows, chosen = router.rows(ffn, partition, context), router.representatives(ffn, partition, context)
    for row, j in zip(rows, chosen, strict=True):
        own = (ffn.gate_FH if form == "gate" else ffn.up_FH)[j]
        torch.testing.assert_close(row, torch.zeros(8) if j == PADDING else own / own.norm())


@pytest.mark.parametrize("partition", [PADDED, OVERLAPPING])
def test_product_is_ridge_regression_of_cmoes_score(partition: Partition) -> None:
    ffn, context = random_ffn(), layer_context(random_inputs(batch_tokens=7), 4)
    router = Analytic(Analytic.Options(ridge=0.1))
    x = context.inputs.x_TH.double().numpy()
    aim = plain_scores(ffn, router.representatives(ffn, partition, context), context.inputs.x_TH)
    lam = 0.1 * (x**2).sum() / 8
    stacked = np.vstack([x, np.sqrt(lam) * np.eye(8)])
    plain = np.linalg.lstsq(stacked, np.vstack([aim, np.zeros((8, 4))]), rcond=None)[0].T
    np.testing.assert_allclose(router.rows(ffn, partition, context).numpy(), plain, rtol=1e-4, atol=1e-5)


def test_scores_are_cmoes() -> None:
    ffn, context = random_ffn(), layer_context(random_inputs(batch_tokens=7), 4)
    chosen = np.array([3, PADDING, 23, 0])
    scores = torch.cat(list(cmoe_scores(ffn, torch.from_numpy(chosen), context)))
    np.testing.assert_allclose(scores.numpy(), plain_scores(ffn, chosen, context.inputs.x_TH), rtol=1e-4, atol=1e-5)


def recall(logits: torch.Tensor, scores: torch.Tensor, top_k: int) -> float:
    hits = [
        len(set(a.tolist()) & set(b.tolist()))
        for a, b in zip(logits.topk(top_k).indices, scores.topk(top_k).indices, strict=True)
    ]
    return sum(hits) / (top_k * len(hits))


def test_the_default_form_follows_cmoe_best() -> None:
    """On other tokens than it was fitted on, for inputs that share a large mean, as behind an RMSNorm."""
    sums = dict.fromkeys(("product", "gate", "up"), 0.0)
    for seed in range(5):
        ffn, every = random_ffn(48, 16, seed), random_inputs(1200, 16, seed + 50)
        every.x_TH.add_(2 * every.x_TH.mean(0))
        fit, held_out = layer_inputs(every.x_TH[:800]), layer_inputs(every.x_TH[800:])
        context = LayerContext(0, 8, 2, 6, seed, fit)
        partition = Random().split(ffn, NONE, context)
        chosen = torch.from_numpy(Analytic().representatives(ffn, partition, context))
        scores = torch.cat(list(cmoe_scores(ffn, chosen, LayerContext(0, 8, 2, 6, seed, held_out))))
        for form in sums:
            rows = Analytic(Analytic.Options(form=form)).rows(ffn, partition, context)
            sums[form] += recall(held_out.x_TH @ rows.T, scores, 2) / 5
    assert max(sums, key=lambda form: sums[form]) == Analytic().options.form == "product"
    assert sums["product"] > 2 * 2 / 8, "twice what chance finds"


def test_planted_neurons_are_found() -> None:
    """Tokens of four kinds, each with one neuron that answers to it: every form sends a kind to its expert."""
    eye = torch.eye(4, 8)
    ffn = FfnWeights(3 * eye.repeat(6, 1), eye.repeat(6, 1), torch.randn(8, 24), torch.ones(8))
    kind = torch.arange(100) % 4
    x = 4 * eye[kind] + 0.1 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    partition = Partition(np.arange(24).reshape(6, 4).T.copy(), NONE, NONE)
    for form in ("product", "gate", "up"):
        rows = Analytic(Analytic.Options(form=form)).rows(ffn, partition, layer_context(layer_inputs(x), 6))
        assert torch.equal((x @ rows.T).argmax(1), kind)


@pytest.mark.parametrize("form", ["product", "gate", "up"])
def test_batch_size_changes_nothing(form: str) -> None:
    first, *others = (
        Analytic(Analytic.Options(form=form, max_tokens=15)).rows(
            random_ffn(), PADDED, layer_context(random_inputs(batch_tokens=batch), 4)
        )
        for batch in (4096, 7, 1)
    )
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-6)


def test_registered_and_says_that_it_is_folded() -> None:
    assert ROUTERS.get("analytic") is Analytic
    assert Analytic.needs == "activations"
    assert Analytic.exportable
    assert "linear" in Analytic.summary
