"""Mean input directions as router rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamamoe.errors import LlamaMoeError
from llamamoe.methods.layer import PADDING, FfnWeights, LayerContext, Partition
from llamamoe.methods.routers import ROUTERS
from llamamoe.methods.routers.hidden_centroid import HiddenCentroid
from tests.methods.splitters.calibrated import layer_context, layer_inputs, plain_hidden, random_ffn, random_inputs

NONE = np.empty(0, np.int64)
PADDED = Partition(
    np.array([[0, 3, 5, 9], [1, 2, PADDING, PADDING], [PADDING] * 4, [4, 6, 7, 8]]), np.arange(10, 24), NONE
)
FULL = Partition(np.arange(24).reshape(4, 6), NONE, NONE)


def test_rows_of_the_partition_are_taken() -> None:
    rows = torch.randn(4, 8)
    partition = Partition(PADDED.experts, PADDED.shared, NONE, rows)
    assert torch.equal(HiddenCentroid().rows(random_ffn(), partition, layer_context(random_inputs(), 4)), rows)


@pytest.mark.parametrize(("partition", "compared"), [(PADDED, 2), (FULL, 4)])
def test_rows_are_the_formula(partition: Partition, compared: int) -> None:
    ffn, inputs = random_ffn(), random_inputs(batch_tokens=7)
    rows = HiddenCentroid().rows(ffn, partition, layer_context(inputs, 4, top_k=2))
    h, down = plain_hidden(ffn, inputs.x_TH), ffn.down_HF.double().numpy()
    unit = [x / np.linalg.norm(x) for x in inputs.x_TH.double().numpy()]
    for i in range(4):
        tokens = []
        for t in range(inputs.num_tokens):
            power = [
                sum(h[t, j] ** 2 * (down[:, j] @ down[:, j]) for j in e if j != PADDING) for e in partition.experts
            ]
            if i in np.argsort(power)[-2:]:
                tokens.append(t)
        if len(tokens) in (0, inputs.num_tokens):
            assert not rows[i].any()
            continue
        compared -= 1
        plain = np.mean([unit[t] for t in tokens], axis=0) - np.mean(unit, axis=0)
        np.testing.assert_allclose(rows[i].numpy(), plain / np.linalg.norm(plain), rtol=1e-3, atol=1e-5)
    assert compared <= 0


def test_planted_tokens_go_to_their_expert_in_spite_of_a_common_direction() -> None:
    """All tokens share a direction ten times as large as what tells them apart."""
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(4, 8)
    ffn = FfnWeights(3 * eye.repeat(6, 1), eye.repeat(6, 1), torch.randn(8, 24, generator=generator), torch.ones(8))
    kind = torch.arange(200) % 4
    common = torch.zeros(8)
    common[7] = 10
    x = eye[kind] + common + 0.1 * torch.randn(200, 8, generator=generator)
    partition = Partition(np.arange(24).reshape(6, 4).T.copy(), NONE, NONE)
    rows = HiddenCentroid().rows(ffn, partition, LayerContext(0, 4, 1, 6, 0, layer_inputs(x)))
    assert torch.equal((x @ rows.T).argmax(1), kind)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))


def test_no_row_for_an_expert_that_is_always_or_never_chosen() -> None:
    context = layer_context(random_inputs(), 4, top_k=4)
    assert not HiddenCentroid().rows(random_ffn(), PADDED, context).any(), "all four are always chosen"
    rows = HiddenCentroid().rows(random_ffn(), PADDED, layer_context(random_inputs(), 4, top_k=1))
    assert not rows[2].any(), "the empty expert is never the largest contributor"


def test_batch_size_changes_nothing() -> None:
    first, *others = (
        HiddenCentroid().rows(random_ffn(), PADDED, layer_context(random_inputs(batch_tokens=batch), 4))
        for batch in (4096, 7, 1)
    )
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-6)


def test_nan_names_the_layer() -> None:
    inputs = random_inputs()
    inputs.x_TH[3, 2] = torch.nan
    with pytest.raises(LlamaMoeError, match="layer 17"):
        HiddenCentroid().rows(random_ffn(), PADDED, layer_context(inputs, 4, layer=17))


def test_registered() -> None:
    assert ROUTERS.get("hidden_centroid") is HiddenCentroid
    assert HiddenCentroid.needs == "activations"
