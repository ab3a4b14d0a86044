"""mergekit-moe, asked for the same, writes the same weights; needs mergekit, which LLAMAMOE_MERGEKIT names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.mix_mergekit import by_llamamoe, by_mergekit, compare, make_experts
from tests.dense import make_byte_level, make_dense

PROGRAM = os.environ.get("LLAMAMOE_MERGEKIT", "")


@pytest.mark.skipif(not PROGRAM, reason="LLAMAMOE_MERGEKIT does not name mergekit-moe")
@pytest.mark.parametrize(("mode", "tokens"), [("hidden", "last"), ("hidden_avg", "mean")])
def test_the_same_weights_where_the_same_is_asked(mode: str, tokens: str, tmp_path: Path) -> None:
    base = make_dense(tmp_path / "base", intermediate_size=160, vocab_size=300)  # without padding
    make_byte_level(base)
    experts = make_experts(base, tmp_path)
    theirs, _ = by_mergekit(PROGRAM, base, experts, tmp_path, mode)
    ours, _ = by_llamamoe(base, experts, tmp_path, tokens)
    found = compare(ours, theirs)
    assert found["names_only_here"] == found["names_only_there"] == []
    assert found["equal_tensors"] == found["tensors"] > 0
    assert found["least_cosine_of_router_rows"] > 0.999  # mergekit runs the base in bfloat16
