"""Parity of a layer before repair: exact partitions pass whatever was fitted on top, others do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llamamoe.methods.layer import ExpertWeights, Partition
from llamamoe.methods.moe_layer import ConvertedFfn, parity_before_repair
from tests.converted import NEURONS, make_ffn, make_inputs, make_moe, make_partition, plain_dense


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize(("weighting", "factor"), [("softmax", 4.0), ("renormalised", 4.0), ("sigmoid", 2.0)])
def test_a_partition_is_exact_before_repair(kind: str, weighting: str, factor: float) -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn, make_partition(kind), weighting=weighting, factor=factor)
    repaired = replace(moe, weights=replace(moe.weights, down_HP=moe.weights.down_HP * 3))
    assert parity_before_repair(repaired, ffn, inputs) < 1e-6
    assert parity_before_repair(replace(moe, factor=2 * factor), ffn, inputs, 0.5) < 1e-6
    assert parity_before_repair(replace(moe, factor=2 * factor), ffn, inputs) > 0.1


def test_what_is_missing_shows() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    found = parity_before_repair(make_moe(ffn, make_partition("overlap")), ffn, inputs, batches=1)
    x = inputs.x_TH[:64]
    used = torch.from_numpy(make_partition("overlap").slots)
    counts = torch.bincount(used[used >= 0], minlength=NEURONS).numpy()
    scaled = replace(ffn, down_HF=ffn.down_HF * torch.from_numpy(counts - 1.0).float())
    expected = np.abs(plain_dense(scaled, x)).max() / np.abs(plain_dense(ffn, x)).max()
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_value_that_is_not_finite_is_no_parity() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    moe = make_moe(ffn)
    inputs.x_TH[3, 0] = float("nan")
    assert parity_before_repair(moe, ffn, inputs) == float("inf")


def test_a_layer_without_experts_is_its_shared_neurons() -> None:
    ffn, inputs = make_ffn(), make_inputs()
    kept = np.arange(0, NEURONS, 2)
    partition = Partition(np.empty((0, 0), np.int64), kept, np.arange(1, NEURONS, 2))
    moe = ConvertedFfn(
        ExpertWeights.of_parent(ffn, partition), partition, torch.empty(0, 8), 0, "hard", "renormalised", 1.0
    )
    assert moe.expert_weights(inputs.x_TH).shape == (200, 0)
    found = torch.cat(list(moe.outputs(inputs)))
    index = torch.from_numpy(kept)
    small = replace(ffn, gate_FH=ffn.gate_FH[index], up_FH=ffn.up_FH[index], down_HF=ffn.down_HF[:, index])
    np.testing.assert_allclose(found.numpy(), plain_dense(small, inputs.x_TH), rtol=1e-4, atol=1e-4)
