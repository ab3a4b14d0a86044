"""Moving bits: taking, casting and re-ordering against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamoe.assembly import cast, interleave, nonfinite, take
from llamamoe.layer import PADDING

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 9), st.integers(0, 20), st.sampled_from(DTYPES), st.sampled_from([0, 1]), st.integers(0, 99))  # fmt: skip
def test_take(rows: int, columns: int, count: int, dtype: torch.dtype, axis: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    index = np.random.default_rng(seed).integers(PADDING, matrix.shape[axis], count)
    found = take(matrix, index, axis)
    padded = torch.cat([matrix, torch.zeros_like(matrix.narrow(axis, 0, 1))], axis)
    assert torch.equal(found, padded.index_select(axis, torch.from_numpy(index % padded.shape[axis])))
    assert found.dtype == dtype
    assert torch.equal(take(matrix.T, index, 1 - axis), found.T), "also of a view that is not contiguous"


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from([1.0, 4.0, 0.25, 3.0, 16 / 3]), st.integers(0, 9)
)
def test_cast_rounds_once(source: torch.dtype, target: torch.dtype, scale: float, seed: int) -> None:
    value = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(source)
    found = cast(value, target, scale)
    assert found.dtype == target
    exact = value.double() * scale
    assert ((found.double() - exact).abs() <= torch.finfo(target).eps * 0.6 * exact.abs() + 1e-6).all()
    if scale == 1.0 and source == target:
        assert found is value


@settings(deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from([0.0, -1.0, float("nan"), float("inf"), -float("inf")]), st.integers(0, 29)
)
def test_nonfinite(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.randn(5, 6).to(dtype)
    tensor.view(-1)[place] = value
    assert nonfinite(tensor) == (not bool(torch.isfinite(tensor).all()))


def test_nothing_is_finite() -> None:
    assert not nonfinite(torch.empty(0, 3))


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 8), (4, 16)])
def test_interleave(heads: int, dim: int) -> None:
    rows = torch.arange(heads * dim).reshape(heads * dim, 1)
    found = interleave(rows, heads).reshape(heads, dim)
    for head in range(heads):
        start = head * dim
        assert found[head, ::2].tolist() == list(range(start, start + dim // 2))
        assert found[head, 1::2].tolist() == list(range(start + dim // 2, start + dim))
    assert torch.equal(interleave(rows[:, 0], heads), interleave(rows, heads)[:, 0])
