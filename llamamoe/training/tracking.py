"""Trackers that a run reports to go on with the run that they began."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def same_tracked_run(report_to: Any, run: str | None) -> Iterator[None]:
    """Let Weights & Biases give a resumed run the record of its start, by the id of the run's folder.

    ``wandb.init``, which transformers calls, reads both variables; those that a user has set are left alone.

    Args:
        report_to: As in transformers' TrainingArguments.
        run: The id.
    """
    named = [report_to] if isinstance(report_to, str) else list(report_to or ())
    given = {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
    if run is None or not {"wandb", "all"} & set(named) or "WANDB_RUN_ID" in os.environ:
        yield
        return
    added = {key: value for key, value in given.items() if value is not None and key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
