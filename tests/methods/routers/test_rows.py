"""Router rows against plain formulas, and what shrinking does to the ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamamoe.methods.layer import PADDING, FfnWeights, LayerContext, Partition
from llamamoe.methods.router_scale import HARD_LOGIT, is_hard, scale_router
from llamamoe.methods.routers.centroid import Centroid
from llamamoe.methods.selectors.weight_norm import WeightNorm


def layer(seed: int = 0) -> FfnWeights:
    torch.manual_seed(seed)
    return FfnWeights(torch.randn(1100, 16), torch.randn(1100, 16), torch.randn(16, 1100), torch.rand(16) + 0.5)


def test_centroid_is_the_mean_of_unit_rows() -> None:
    ffn, none = layer(), np.empty(0, np.int64)
    experts = np.array([[0, 3, 5], [1, 2, PADDING], [PADDING] * 3])
    rows = Centroid().rows(ffn, Partition(experts, none, none), LayerContext(0, 3, 1, 3, 0))
    unit = ffn.gate_FH / ffn.gate_FH.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows, torch.stack([unit[[0, 3, 5]].mean(0), unit[[1, 2]].mean(0), torch.zeros(16)]))


def test_weight_norm_is_the_product_of_norms() -> None:
    ffn, context = layer(), LayerContext(0, 4, 1, 300, 0)
    norms = [(m * ffn.norm_H).norm(dim=1).double() for m in (ffn.gate_FH, ffn.up_FH)]
    plain = norms[0] * norms[1] * ffn.down_HF.norm(dim=0).double()
    np.testing.assert_allclose(WeightNorm().scores(ffn, context), plain.numpy(), rtol=1e-5)
    chosen = WeightNorm().select(ffn, 100, context)
    assert set(chosen) == set(plain.topk(100).indices.tolist())
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)])
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0])
def test_hard_keeps_the_ranking(name: str, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, norm = torch.randn(16, 512, generator=generator) * size, torch.rand(512, generator=generator) + 0.5
    x = torch.nn.functional.rms_norm(torch.randn(400, 512, generator=generator), (512,)) * norm
    soft, hard = rows.to(dtype), scale_router(rows, norm, "hard", name)
    stored = hard.rows_NH.to(dtype)
    assert hard.exponent <= 0
    before = x @ soft.float().T
    after = torch.softmax((x @ stored.float().T).float(), -1)
    for k in (1, 2, 4, 8):
        ranked = before.sort(dim=1, descending=True).values
        clear = ranked[:, k - 1] - ranked[:, k] > 0.01 * before.abs().amax(1)
        want, have = before.topk(k).indices.sort(1).values, after.topk(k).indices.sort(1).values
        assert clear.sum() > 100
        assert torch.equal(want[clear], have[clear])
    assert float((x @ stored.float().T).abs().max()) <= hard.logit_bound * 1.01
    if name != "F16":
        assert float(after.max() * 16 - 1) < 2 * HARD_LOGIT, "weights are equal"


@pytest.mark.parametrize("name", ["F32", "BF16", "F16"])
def test_hard_and_soft_routers_are_told_apart(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, norm = torch.randn(16, 512, generator=generator) * 0.02, torch.rand(512, generator=generator) + 0.5
    assert is_hard(scale_router(rows, norm, "hard", name).rows_NH, norm)
    assert not is_hard(scale_router(rows, norm, "soft", name).rows_NH, norm)


def test_soft_leaves_rows_alone() -> None:
    rows = torch.randn(4, 8)
    assert torch.equal(scale_router(rows, torch.ones(8), "soft", "F32").rows_NH, rows)
