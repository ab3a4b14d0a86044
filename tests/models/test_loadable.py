"""The check of what transformers will open: what it leaves behind in the process."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest

from llamamoe.errors import CheckpointError
from llamamoe.models import loadable


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_garbage_collector_rests_during_the_check_only(
    monkeypatch: pytest.MonkeyPatch, enabled: bool, fails: bool
) -> None:
    during: list[bool] = []

    def check(*_: Any) -> None:
        during.append(gc.isenabled())
        if fails:
            raise CheckpointError("no")

    monkeypatch.setattr(loadable, "_check_model", check)
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(CheckpointError, match="no") if fails else nullcontext():
            loadable.check_model({}, {})
        assert during == [False]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
