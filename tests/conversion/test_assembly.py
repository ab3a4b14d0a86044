"""Moving bits: taking, casting and re-ordering against plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamamoe.architectures.moe_layout import Combine, MoeLayout, Neurons, OutTensor
from llamamoe.checkpoint.tensors import cast, interleave, nonfinite
from llamamoe.conversion.assembly import LayerParts, made_of, take
from llamamoe.methods.layer import PADDING, ExpertWeights, FfnWeights, Partition

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(1, 600), st.integers(1, 9), st.integers(0, 20), st.sampled_from(DTYPES), st.sampled_from([0, 1]), st.integers(0, 99))  # fmt: skip
def test_take(rows: int, columns: int, count: int, dtype: torch.dtype, axis: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    index = np.random.default_rng(seed).integers(PADDING, matrix.shape[axis], count)
    found = take(matrix, index, axis)
    padded = torch.cat([matrix, torch.zeros_like(matrix.narrow(axis, 0, 1))], axis)
    assert torch.equal(found, padded.index_select(axis, torch.from_numpy(index % padded.shape[axis])))
    assert found.dtype == dtype
    assert torch.equal(take(matrix.T, index, 1 - axis), found.T), "also of a view that is not contiguous"


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


def _parts(dtype: torch.dtype, replaced: bool) -> tuple[LayerParts, ExpertWeights]:
    """Two experts of width 3 with a padded place, a neuron in both, one omitted, and two shared ones of stored width 4."""
    draw = torch.Generator().manual_seed(1)
    ffn = FfnWeights(*(torch.randn(*s, generator=draw).to(dtype) for s in ((7, 5), (7, 5), (5, 7), (5,))))
    partition = Partition(np.array([[0, 2, 5], [2, 3, PADDING]]), np.array([1, 6]), np.array([4]))
    weights = ExpertWeights.of_parent(ffn, partition)
    if replaced:
        weights = ExpertWeights(weights.gate_PH * 1.5, weights.up_PH * 0.7, weights.down_HP / 3)
    combine = Combine("renormalised", 2.0, 2.0, True, 1.0)
    layout = MoeLayout(2, 1, 3, 2, 4, (), combine)
    return LayerParts(ffn, partition, torch.zeros(2, 5), layout, weights if replaced else None), weights


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_a_whole_ffn_is_not_copied_and_never_changed(part: Any, scale: float) -> None:
    draw = torch.Generator().manual_seed(1)
    ffn = FfnWeights(*(torch.randn(*s, generator=draw) for s in ((7, 5), (7, 5), (5, 7), (5,))))
    partition = Partition(np.arange(7)[None].repeat(2, 0), np.empty(0, np.int64), np.empty(0, np.int64))
    parts = LayerParts(
        ffn, partition, torch.zeros(2, 5), MoeLayout(2, 1, 7, 0, 0, (), Combine("renormalised", 1.0, 1.0, True, 1.0))
    )
    matrix = parts.matrices[("gate", "up", "down").index(part)]
    before = matrix.clone()
    found = parts.neurons(Neurons(part, 1, scale), torch.float32)
    assert torch.equal(found, before * scale)
    assert torch.equal(matrix, before)
    assert (found.data_ptr() == matrix.data_ptr()) == (scale == 1.0)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", [0, 1, "shared", "all"])
@pytest.mark.parametrize("part", ["gate", "up", "down", "gate_up"])
def test_neurons_of_replaced_weights_come_from_their_places(
    part: Any, expert: Any, dtype: torch.dtype, replaced: bool
) -> None:
    """Place by place: shared ones first, then expert by expert; what has no neuron is zero; one cast."""
    parts, weights = _parts(dtype, replaced)
    found = parts.neurons(Neurons(part, expert, 3.0), dtype)
    rows: dict[Any, list[int | None]] = {"shared": [0, 1, None, None], 0: [2, 3, 4], 1: [5, 6, 7]}
    zero = torch.zeros(5)

    def rows_of(matrix: torch.Tensor, which: Any) -> torch.Tensor:
        return torch.stack([zero if place is None else matrix[place] for place in rows[which]])

    def want(which: Any) -> torch.Tensor:
        gate, up, down = (rows_of(m, which) for m in (weights.gate_PH, weights.up_PH, weights.down_HP.T))
        return {"gate": gate, "up": up, "down": down.T, "gate_up": torch.cat([gate, up])}[part]

    expected = torch.stack([want(0), want(1)]) if expert == "all" else want(expert)
    assert torch.equal(found, (expected * 3.0).to(dtype))


def test_values_that_are_not_finite_are_looked_for_where_they_come_from() -> None:
    tensor = OutTensor("x", (3, 5), "routed", Neurons("gate", 0), 0)
    model: Any = None
    for replaced in (False, True):
        parts, _ = _parts(torch.float32, replaced)
        assert not any(nonfinite(used) for used in made_of(tensor, model, parts))
        parts.matrices[0][3, 0] = float("nan")
        assert any(nonfinite(used) for used in made_of(tensor, model, parts))
