"""bfloat16 products computed in float32: where they are, and that they change nothing but rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llamamoe.models.experts import EXPERTS, masked, products, sorted_loop
from llamamoe.models.experts.grouped import group_by_expert

from .test_implementations import call, experts_of, make_model, plain, random_inputs


def cpu(vendor: str, *flags: str) -> str:
    one = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu sse2 {' '.join(flags)}\n\n"
    return one + one.replace("processor\t: 0", "processor\t: 1")


@pytest.mark.parametrize(
    ("cpuinfo", "faster"),
    [
        (cpu("GenuineIntel", "avx512f", "avx512_bf16"), True),
        (cpu("GenuineIntel", "avx512f", "avx512_bf16", "amx_bf16"), False),
        (cpu("GenuineIntel", "avx2"), True),
        (cpu("AuthenticAMD", "avx512f", "avx512_bf16"), False),
        (cpu("AuthenticAMD", "avx2"), True),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_the_processor_decides(cpuinfo: str, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert products.float32_is_faster(cpuinfo) == faster
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not products.float32_is_faster(cpuinfo)


def test_without_cpuinfo_nothing_is_converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "none")
    assert not products._float32_is_faster.__wrapped__()


def test_only_bfloat16_of_many_rows_or_small_matrices_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_float32_is_faster", lambda: True)
    x = torch.ones(1, 8)
    assert products.float32_products(x.bfloat16(), rows=96, numbers=4 << 20)
    assert not products.float32_products(x.bfloat16(), rows=24, numbers=4 << 20)
    assert products.float32_products(x.bfloat16(), rows=2, numbers=1 << 16)
    assert not products.float32_products(x.half(), rows=96, numbers=4 << 20)
    assert not products.float32_products(x, rows=96, numbers=4 << 20)
    monkeypatch.setattr(products, "_float32_is_faster", lambda: False)
    assert not products.float32_products(x.bfloat16(), rows=96, numbers=4 << 20)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("faster", [False, True])
def test_both_ways_give_the_output_and_gradients_of_float64(
    faster: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_float32_is_faster", lambda: faster)
    inputs, indices = random_inputs(73, 3, 2, dtype=torch.bfloat16)
    dtype = torch.float32 if autocast else torch.bfloat16
    mine = call("sorted", [t.to(dtype) for t in inputs], indices, autocast=autocast)
    exact = call("sorted", [t.double() for t in inputs], indices)
    for a, b in zip(mine, exact, strict=True):
        assert a.dtype == dtype
        assert 1e-4 < (a - b).norm() / b.norm() < 1e-2


def test_products_in_float32_are_exact_but_for_the_order_of_sums() -> None:
    groups = group_by_expert(torch.zeros(4, 1, dtype=torch.int64), 1, pad=False, float32=True)
    a, b = torch.randn(4, 64).bfloat16(), torch.randn(64, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = groups.product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["expert by expert", "all at once"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_both_orders_agree_with_the_sum_written_out(
    whole: bool, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_loop, "WHOLE", 1 << 40 if whole else 0)
    (x, gate_up, down, weights), indices = random_inputs(37, 5, 2, dtype=dtype)
    indices[3] = torch.tensor([5, -1])
    experts = experts_of(make_model(num_local_experts=5))
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = EXPERTS.get("sorted")()(experts, x, indices, weights)
        empty = EXPERTS.get("sorted")()(experts, x, torch.full_like(indices, 5), weights)
    expected = plain(*(t.double() for t in (x, gate_up, down)), indices, weights.double())
    assert y.dtype == dtype
    assert (y - expected).norm() <= (1e-12 if dtype == torch.float64 else 1e-2) * expected.norm()
    assert not empty.any()


@pytest.mark.parametrize(("few", "some"), [(99, 99), (0, 99), (0, 0)], ids=["few", "some", "many"])
def test_every_way_of_masked_agrees_with_eager(few: int, some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "FEW", few)
    monkeypatch.setattr(masked, "SOME", some)
    inputs, indices = random_inputs(20, 4, 2, width=8)
    for mine, expected in zip(call("masked", inputs, indices), call("eager", inputs, indices), strict=True):
        torch.testing.assert_close(mine, expected)
