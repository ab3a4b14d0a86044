"""The Trainer of transformers with llamamoe's batches, objective, optimiser groups, metrics and checkpoints.

Importing this module imports transformers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.unmapped import unmapped
from ..progress import counting
from .adamw import CompactAdamW, ShardAdamW
from .checkpoints import Checkpoints
from .clipping import clip_factor, clip_together, scale
from .divergence import diverged, first_bad
from .flow import Flow
from .lora import load_rest
from .metrics import finite
from .native_weights import reshard
from .optimizer_state import named_groups
from .ownership import STAGING, discard, named_checkpoints, step_of
from .parameters import follow_recipe, lr_factors, optimizer_groups
from .parts import Parts
from .resuming import by_deepspeed, state_errors
from .run_folder import rotate

log = logging.getLogger("llamamoe")


class MoeTrainer(Trainer):
    """Transformers' Trainer for a native mixture of experts.

    The global loss is normalised by the tokens of the global batch, so that no term depends on how a batch is split
    into micro-batches and ranks, except the balance losses, which use one micro-batch (or all ranks) at a time.

    Args:
        model: The native model.
        args: See `arguments.training_arguments`.
        parts: The rest of the run.
        resumed: Whether the run resumes from a checkpoint: then it was already measured at its start.
    """

    def __init__(self, model: Any, args: TrainingArguments, parts: Parts, *, resumed: bool = False) -> None:
        self.parts = parts
        held_out: Any = range(1) if parts.validation is not None else None
        self._resumed = resumed
        args.eval_on_start = args.eval_on_start and not resumed
        super().__init__(model=model, args=args, eval_dataset=held_out, callbacks=[Flow(self)])
        self.checkpoints = Checkpoints(self)
        self.loss_is_scaled_for_ga = True  # by the objective, over the whole global batch
        self._logged = (time.monotonic(), 0)
        self._micro_losses: list[tuple[tuple[int, int], torch.Tensor]] = []
        self._saved_step = -1
        self._norm_of_gate: float | None = None
        for callback in ("PrinterCallback", "ProgressCallback"):
            self.callback_handler.callbacks = [
                each for each in self.callback_handler.callbacks if type(each).__name__ != callback
            ]

    # Data

    def get_train_dataloader(self) -> Any:
        """Return this rank's micro-batches, which accelerate must not distribute again."""
        self.parts.batches.first_step = self.state.global_step
        return self.parts.batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the micro-batches of one step, without token counts, since blocks have no padding."""
        samples = list(islice(epoch_iterator, num_batches))
        return samples, None

    def _prepare_input(self, data: Any) -> Any:
        """Move as transformers does, and without waiting if the memory is pinned."""
        if isinstance(data, torch.Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        base: Any = super()
        return base._prepare_input(data)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Initialise as transformers does; batches continue at the checkpoint, intervals of logs and saves are new."""
        found: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.args.max_steps)
        self.parts.batches.first_step = self.state.global_step
        self._logged = (time.monotonic(), self.state.global_step)
        self._saved_step = self.state.global_step if self._resumed else -1
        return found

    def forget_later(self) -> None:
        """Drop lines of metrics and checkpoints of steps that are repeated."""
        step = self.state.global_step if self._resumed else -1
        self.parts.metrics.resume(step)
        if self.parts.changes:
            if self.args.should_save:
                log.warning("from step %d on: %s", step + 1, self.parts.changes.describe())
            self.parts.metrics.write(step, {"kind": "change", "changed": self.parts.changes.to_json()}, {})
        for path in named_checkpoints(self.parts.folder) if self.args.should_save else ():
            if step_of(path) > step:
                discard(self.parts.folder, path)
        if self._resumed and self.args.should_save:  # a kill may have happened between the last checkpoint and this
            rotate(self.parts.folder, self.parts.recipe.keep)

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return this micro-batch's part of the global loss, times the ranks over which gradients are averaged."""
        with self.accelerator.autocast():
            loss = self.parts.objective(model, inputs, self.state.global_step)
        self._micro_losses.append((inputs["place"], loss.detach()))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the model's gradients as transformers does, and the gate's with them or apart; return the norm before."""
        base: Any = super()
        norm, most = base._clip_grad_norm(model), self.args.max_grad_norm
        of_gate = self._gate_norm()
        if not of_gate:
            return norm
        gate = self.parts.dynamics.gate_parameters()
        # DeepSpeed clips later, by the norm of the parameters that it has.
        if self.parts.recipe.optimizer.gate_clipping == "apart" or self.is_deepspeed_enabled:
            scale(gate, clip_factor(of_gate, most))
            return norm
        return clip_together(model.parameters(), gate, float(norm), of_gate, most)

    def _gate_norm(self) -> float:
        """Return the norm of the gate's gradients, averaged over ranks at the first call of a step."""
        if self._norm_of_gate is None:
            self._norm_of_gate = self.parts.dynamics.average_gate_gradients()
        return self._norm_of_gate

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm; one that is not finite, of the model's or the gate's gradients, ends the run."""
        base: Any = super()
        norm = base._get_grad_norm(model, grad_norm=grad_norm)
        of_gate, self._norm_of_gate = self._gate_norm(), None
        if norm is not None and not (math.isfinite(float(norm)) and math.isfinite(of_gate)):
            self._diverged(float(norm) + of_gate)
        self._micro_losses.clear()
        return norm

    def _diverged(self, norm: float) -> None:
        step, recipe, folder = self.state.global_step, self.parts.recipe, self.parts.folder
        bad = first_bad(self._micro_losses, self.args.device)
        if self._saved_step != step:  # an intact checkpoint is not written again
            self._save_checkpoint(self.model, None)
        self.checkpoints.finish()
        raise diverged(bad, step, norm, self.parts.batches.describe, recipe, folder)

    # Optimisation

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW over the groups of the recipe."""
        if self.optimizer is None:
            recipe, trained = self.parts.recipe, model or self.model
            assert trained is not None
            gate = self.parts.dynamics.gate_parameters()
            groups = optimizer_groups(trained, recipe, gate)
            fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
            moments = recipe.precision.moments
            dtype = getattr(torch, moments) if moments else None
            small = partial(CompactAdamW, moments=dtype, seed=recipe.seed)
            kind: Any = small if recipe.compacts else ShardAdamW
            self.optimizer = kind(
                named_groups(groups, trained, gate),
                lr=recipe.optimizer.lr,
                betas=recipe.optimizer.betas,
                eps=recipe.optimizer.eps,
                fused=fused,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the recipe's schedule, group by group."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            factors = lr_factors(optimizer.param_groups, self.parts.recipe)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with llamamoe's metrics, and write the same as a line of ``metrics.jsonl``."""
        if "loss" in logs:
            values, times = self._train_line(logs)
            self.parts.metrics.write(self.state.global_step, {"kind": "train", **finite(values)}, times)
            logs = {**logs, **{k: v for k, v in _scalars(values).items() if v is not None}, **times}
        super().log(logs, None)

    def _train_line(self, logs: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
        parts, step = self.parts, self.state.global_step
        now, (since, last) = time.monotonic(), self._logged
        self._logged = (now, step)
        steps = max(1, step - last)
        scalars, per_domain = parts.sums.read()
        values: dict[str, Any] = {"loss": logs["loss"], "grad_norm": logs.get("grad_norm")}
        values |= parts.objective.terms(scalars, steps)
        values["domain_loss"] = {name: total / tokens for name, (total, tokens) in per_domain.items()}
        values["tokens"] = step * parts.recipe.tokens_per_step
        assert self.optimizer is not None
        values["lr"] = {str(group["name"]): group["lr"] for group in self.optimizer.param_groups}
        values |= parts.dynamics.values(step)
        rate = steps * parts.recipe.tokens_per_step / max(now - since, 1e-9)
        times = {"tokens_per_second": round(rate, 1), "active_tflops": round(rate * parts.flops_per_token / 1e12, 4)}
        if parts.peak_flops:
            times["mfu_active"] = round(rate * parts.flops_per_token / parts.peak_flops, 4)
        return values, times

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return loss and perplexity of the held-out blocks, by domain and on average."""
        assert self.parts.validation is not None
        assert self.model is not None
        started = time.monotonic()
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            found = self.parts.validation.measure(self.model_wrapped, self.parts.objective.head, self._advance())
        reshard(self.model)
        step = self.state.global_step
        tokens = step * self.parts.recipe.tokens_per_step
        line = {"kind": "validation", "tokens": tokens, **found}
        self.parts.metrics.write(step, finite(line), {"validation_seconds": round(time.monotonic() - started, 3)})
        self._logged = (self._logged[0] + time.monotonic() - started, self._logged[1])
        if step > 0:
            self.parts.dynamics.after_validation(step, found["domain_loss"])
        flat = {f"{metric_key_prefix}_{key}": value for key, value in _scalars(found).items()}
        self.log(flat)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, flat)
        return flat

    def _advance(self) -> Callable[[str], None]:
        """Return what reports held-out micro-batches before the first step: later ones would hide the steps."""
        if self.state.global_step > 0 or self.parts.validation is None:
            return lambda _: None
        return counting("held-out loss at the start", self.parts.validation.turns, "micro-batch", self.parts.progress)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does, without its progress bars; weights that the ranks divide are not written here."""
        if self.checkpoints.divides_weights and output_dir is not None:
            self.checkpoints.save_model(Path(output_dir))
            return
        with quiet_transformers():
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load adapters; weights were loaded from the checkpoint when the model was created."""
        if self.parts.recipe.lora is not None:
            with unmapped():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_rest(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of optimiser and schedule, by DeepSpeed if it trains."""
        if by_deepspeed(self.parts.recipe):
            with state_errors(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            self.checkpoints.load_optimizer(Path(checkpoint))
        if checkpoint is not None and self.parts.changes:
            assert self.model is not None
            gate = self.parts.dynamics.gate_parameters()
            follow_recipe(
                self.optimizer,
                self.lr_scheduler,
                optimizer_groups(self.model, self.parts.recipe, gate),
                self.parts.recipe,
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the generators of random numbers to their state in a checkpoint."""
        if by_deepspeed(self.parts.recipe):
            with state_errors(checkpoint):
                super()._load_rng_state(checkpoint)
        elif checkpoint is not None:
            self.checkpoints.load_random(Path(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder in which checkpoints are assembled, to be renamed into the run's folder when complete."""
        return str(self.parts.folder / STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save what transformers does and the rest of a checkpoint, see `Checkpoints`."""
        save_others = partial(super()._save_checkpoint, model, trial)
        self.checkpoints.save(save_others)
        self._saved_step = self.state.global_step


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested numbers: ``domain_loss/arxiv``."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat
