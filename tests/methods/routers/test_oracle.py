"""The oracle router: never written."""

from __future__ import annotations

import pytest

from llamamoe.errors import RefusedError
from llamamoe.methods.routers.oracle import Oracle
from tests.converted import make_context, make_ffn, make_inputs, make_moe


def test_it_has_no_rows() -> None:
    ffn, moe = make_ffn(), make_moe(make_ffn())
    assert not Oracle.exportable
    with pytest.raises(RefusedError, match="every expert"):
        Oracle().rows(ffn, moe.partition, make_context(moe, make_inputs()))
