"""The oracle router: never written, and the best choice of experts by contribution."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from llamamoe.errors import RefusedError
from llamamoe.methods.layer import FfnWeights
from llamamoe.methods.routers.oracle import Oracle, oracle_logits
from tests.converted import EXPERTS, TOP_K, make_context, make_ffn, make_inputs, make_moe
from tests.methods.routers.test_ridge import plain_contributions


def test_it_has_no_rows() -> None:
    ffn, moe = make_ffn(), make_moe(make_ffn())
    assert not Oracle.exportable
    with pytest.raises(RefusedError, match="every expert"):
        Oracle().rows(ffn, moe.partition, make_context(moe, make_inputs()))


@pytest.mark.parametrize("kind", ["norm", "power"])
def test_its_logits_choose_the_experts_of_largest_total(kind: str) -> None:
    ffn, inputs = make_ffn(), make_inputs(60)
    moe = make_moe(ffn)
    router = Oracle(Oracle.Options(contribution=kind))
    plain = plain_contributions(moe.weights, moe.partition, inputs.x_TH, kind)
    batches = zip(inputs.inputs(), router.logits(ffn, moe.partition, inputs), strict=True)
    chosen = torch.cat([moe.expert_weights(x, logits) for x, logits in batches]) != 0
    for scores, taken in zip(plain, chosen, strict=True):
        best = max(combinations(range(EXPERTS), TOP_K), key=lambda pair: sum(scores[i] for i in pair))
        assert taken.nonzero().flatten().tolist() == list(best)


def test_experts_that_do_nothing_have_finite_logits() -> None:
    inputs = make_inputs(5)
    moe = make_moe(make_ffn())
    nothing = FfnWeights(*(torch.zeros_like(w) for w in (make_ffn().gate_FH, make_ffn().up_FH, make_ffn().down_HF)), torch.ones(8))  # fmt: skip
    assert all(logits.isfinite().all() for logits in oracle_logits(nothing, moe.partition, inputs))
