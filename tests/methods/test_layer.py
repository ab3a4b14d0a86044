"""Inputs that remember what the parent's neurons do."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.converted import make_ffn, make_inputs


def test_other_tokens_or_dtypes_are_not_taken_for_these() -> None:
    ffn, inputs = make_ffn(), make_inputs(60, 20)
    whole = torch.cat(list(inputs.hidden(ffn)))
    some = replace(inputs, x_TH=inputs.x_TH[40:50])
    torch.testing.assert_close(torch.cat(list(some.hidden(ffn))), whole[40:50])
    coarse = torch.cat(list(replace(inputs, compute_dtype=torch.bfloat16).hidden(ffn)))
    assert not torch.equal(coarse, whole)
    assert torch.equal(torch.cat(list(inputs.hidden(ffn))), whole)


def test_what_is_kept_cannot_be_changed_by_those_who_get_it() -> None:
    ffn, inputs = make_ffn(), make_inputs(10)
    first = next(inputs.hidden(ffn))
    expected = first.clone()
    first.zero_()
    assert torch.equal(next(inputs.hidden(ffn)), expected)
