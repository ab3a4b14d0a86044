"""The parts of a run beside its model, assembled by `build` for the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..progress import ProgressCallback, ignore_progress
from .batches import TokenBatches
from .changes import Changes
from .dynamics import Dynamics
from .metrics import MetricsFile, Sums
from .objective import Objective
from .recipe import PretrainRecipe
from .stopping import StopRequest
from .validation import Validation


@dataclass
class Parts:
    """The parts of a run beside the model.

    Attributes:
        recipe: The recipe.
        folder: The run's folder.
        batches: This rank's micro-batches.
        objective: The loss of a micro-batch.
        sums: Sums for the next line of metrics.
        metrics: The file of metrics.
        dynamics: State that changes beside the weights: gate, selection biases, mixture.
        validation: Held-out blocks; None if there are none.
        finish_checkpoint: Completes a saved checkpoint to a standalone folder (tokenizer, both spellings of the
            configuration, ...).
        flops_per_token: Operations of forward and backward pass by active parameters.
        peak_flops: Peak operations per second of all devices; None if unknown.
        progress: Called after every step.
        stop: The request to stop the run.
        changes: Keys that decide the weights and differ from those of the checkpoint to resume from.
    """

    recipe: PretrainRecipe
    folder: Path
    batches: TokenBatches
    objective: Objective
    sums: Sums
    metrics: MetricsFile
    dynamics: Dynamics
    validation: Validation | None
    finish_checkpoint: Callable[[Path], None]
    flops_per_token: float
    peak_flops: float | None
    progress: ProgressCallback = ignore_progress
    stop: StopRequest = field(default_factory=StopRequest)
    changes: Changes = field(default_factory=lambda: Changes({}))
