"""A trace of some steps by torch's profiler. Importing this module imports transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.files import replacing_path

log = logging.getLogger("llamamoe")


class StepProfile(TrainerCallback):
    """Profiles steps after the first one that the process makes, which allocates and compiles, and writes one trace.

    Traces open in Perfetto (ui.perfetto.dev) and chrome://tracing. `close` it whatever happens to the training.

    Args:
        folder: Where the trace is written: ``profile-RUN-stepN-rankR.json``, N the first step in it.
        run: Id of the run.
        steps: Number of steps in the trace; fewer if training ends before.
    """

    def __init__(self, folder: Path, run: str, steps: int) -> None:
        self._folder, self._run, self._steps = folder, run, steps
        self._profile: Any = None
        self._first = self._rank = 0
        self._over = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin after the first step, end after the last."""
        if self._over:
            return
        if self._profile is None:
            self._first, self._rank = state.global_step + 1, args.process_index
            self._profile = torch.profiler.profile()
            self._profile.start()
        elif state.global_step - self._first + 1 >= self._steps:
            self.close()

    def close(self) -> None:
        """End the profile and write its trace; without effect if none was begun, or at a second call."""
        profile, self._profile, self._over = self._profile, None, True
        if profile is None:
            return
        profile.stop()
        path = self._folder / f"profile-{self._run[:8]}-step{self._first}-rank{self._rank}.json"
        with replacing_path(path) as partial:
            profile.export_chrome_trace(str(partial))
        log.info("the profile was written to %s", path)
