"""The parts of a run beside its model: `build` puts it together, the Trainer uses it."""

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
        recipe: What was asked for.
        folder: The run's folder.
        batches: This rank's micro-batches.
        objective: The loss of a micro-batch.
        sums: What is summed up for the next line of metrics.
        metrics: The file of lines.
        dynamics: What changes beside the weights: gate, selection biases, mixture.
        validation: Held-out blocks; None if there are none.
        finish_checkpoint: Adds to a saved checkpoint what makes it a folder of its own (tokenizer, both spellings of the
            configuration, ...).
        flops_per_token: Operations of forward and backward pass by active parameters.
        peak_flops: What all devices together can do; None if it is not known.
        progress: Told after every step.
        stop: Whether the run was told to end.
        changes: What decides the weights and is otherwise than when the checkpoint to go on from was written.
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
