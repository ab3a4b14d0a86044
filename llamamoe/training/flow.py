"""The callbacks of the Trainer around its steps.

Importing this module imports transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress import Progress

if TYPE_CHECKING:
    from .trainer import MoeTrainer


class Flow(TrainerCallback):
    """The callbacks beside the gradient: move biases and mixture, write lines, report progress."""

    def __init__(self, trainer: MoeTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delete later steps of an earlier start, now that weights and optimiser have been loaded."""
        self._trainer.forget_later()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move selection biases by the load of the step."""
        self._trainer.parts.dynamics.after_optimizer_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Read the sums whenever a checkpoint is made, so that a resumed run writes the same lines."""
        parts = self._trainer.parts
        if parts.stop.agreed(args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        if control.should_save or control.should_evaluate:
            control.should_log = True
        rate = state.global_step * parts.recipe.tokens_per_step
        parts.progress(Progress("train", state.global_step, state.max_steps, "step", f"{rate:,} tokens"))
        return control
