"""The distance to the parent's predictions, and its gradient."""

from __future__ import annotations

import pytest
import torch

from llamamoe.alignment import distance
from llamamoe.alignment.distance import divergence

B, H, V = 11, 6, 17


def head() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(B, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("at_once", "in_cache"), [(1, 1), (3 * V, 2 * V), (1 << 24, 1), (1 << 24, 4 * V), (1 << 24, 1 << 20)]
)
def test_it_is_the_kl_written_out_however_it_is_cut(
    at_once: int, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(distance, "LOGITS_IN_CACHE", in_cache)
    weight, student, parent = head(), hidden(1).requires_grad_(), hidden(2)
    p, q = (torch.softmax(x @ weight.T, -1) for x in (parent, student))
    want = (p * (p / q).log()).sum()
    found = divergence(student, parent, lambda x: x @ weight.T, V)
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    (2 * found).backward()  # type: ignore[no-untyped-call]
    (expected,) = torch.autograd.grad(2 * want, student)
    torch.testing.assert_close(student.grad, expected)


def test_gradient_by_differences() -> None:
    weight, parent = head(), hidden(2)
    student = hidden(1).requires_grad_()
    divergence(student, parent, lambda x: x @ weight.T, V).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None

    def value(x: torch.Tensor) -> float:
        p, q = (torch.log_softmax(each @ weight.T, -1) for each in (parent, x))
        return float((p.exp() * (p - q)).sum())

    for index in ((0, 0), (4, 3), (10, 5)):
        step = torch.zeros_like(student)
        step[index] = 1e-5
        slope = (value(student.detach() + step) - value(student.detach() - step)) / 2e-5
        assert float(student.grad[index]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_it_is_zero_for_the_parent_itself() -> None:
    weight, parent = head(), hidden(2)
    assert float(divergence(parent, parent, lambda x: x @ weight.T, V)) == pytest.approx(0, abs=1e-12)
