"""Memory of a wide mixture whose pieces are selected one by one, beside the plan's estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.finer_memory import make_wide, peak, write_text
from llamamoe.methods.repairs import least_squares

EXPERTS, WIDTH = 16, 128
GRAM = 8 * (EXPERTS * WIDTH) ** 2
"""Bytes of the sums over all pairs of neurons."""


def test_a_wide_layer_is_repaired_without_sums_over_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_wide(tmp_path / "model", EXPERTS, WIDTH, hidden=32)
    text = write_text(tmp_path / "text.txt", 600)
    whole = peak(model, text, tmp_path / "out", 256, "least_squares")
    monkeypatch.setattr(least_squares, "MOST_PLACES", 256)
    parts = peak(model, text, tmp_path / "out", 256, "least_squares")
    assert GRAM < whole.measured < whole.planned
    assert parts.measured < min(GRAM, parts.planned)
    assert parts.planned < whole.planned - GRAM
