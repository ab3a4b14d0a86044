"""State that changes in a run beside the weights: gate noise, selection biases, mixture, routing statistics."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import save_tensors, write_text
from ..errors import LlamaMoeError
from ..lazy import safetensors, torch
from .balancing import BiasBalancing
from .gates.base import Gate
from .mixtures.updates.base import MixtureUpdate
from .resuming import STATE, state_errors
from .routing import Routing
from .routing_statistics import RoutingStatistics

if TYPE_CHECKING:
    from .mixtures.sampler import MixtureSampler

log = logging.getLogger("llamamoe")
GATE = "llamamoe_gate.safetensors"
_ENOUGH = 50
"""Mean assignments per expert from which a window shows whether a router has collapsed."""


class CollapsedError(LlamaMoeError):
    """A router uses few of its experts, and the recipe requests to stop in that case."""


class Dynamics:
    """The moving parts of a run and their state.

    Args:
        gate: The gate in training.
        balancing: Moves selection biases; None without balancing.
        statistics: Routing statistics since the last line of metrics.
        sampler: The mixture.
        update: The rule by which the mixture follows held-out losses.
        reference_losses: Losses with which the update compares them.
        stop_on_collapse: Whether to raise instead of warning.
    """

    def __init__(
        self,
        gate: Gate,
        balancing: BiasBalancing | None,
        statistics: RoutingStatistics,
        sampler: MixtureSampler,
        update: MixtureUpdate,
        reference_losses: Mapping[str, float],
        *,
        stop_on_collapse: bool = False,
    ) -> None:
        self.gate, self.balancing, self.statistics = gate, balancing, statistics
        self.sampler, self.update, self.reference_losses = sampler, update, dict(reference_losses)
        self._stop_on_collapse = stop_on_collapse
        self._warned: set[str] = set()

    def gate_parameters(self) -> Sequence[torch.nn.Parameter]:
        """Return the gate's own trained parameters."""
        return list(self.gate.parameters())

    def begin_micro_batch(self, step: int, micro_batch: int) -> None:
        """Set step and micro-batch, on which alone the gate's noise depends, whatever the ranks and resumes."""
        self.gate.set_step(step, micro_batch)

    def observe(self, routings: Sequence[Routing]) -> None:
        """Count the routing of a micro-batch."""
        self.statistics.add(routings)
        if self.balancing is not None:
            self.balancing.observe(routings)

    def average_gate_gradients(self) -> float:
        """Average the gradients of the gate's own parameters over ranks, which no wrapper does; once in a step.

        Returns:
            Their norm; 0 if the gate has no parameters.
        """
        self.gate.average_gradients()
        found = [each.grad for each in self.gate_parameters() if each.grad is not None]
        return float(torch.nn.utils.get_total_norm(found)) if found else 0.0

    def after_optimizer_step(self) -> None:
        """Move the selection biases, and zero the gate's own gradients, which the model's zeroing misses."""
        for parameter in self.gate_parameters():
            parameter.grad = None
        if self.balancing is not None:
            self.balancing.update()

    def after_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Let the mixture follow the held-out losses of the domains, from the next step on."""
        if not self.update.dynamic or not losses:
            return
        weights = self.update.update(self.sampler.weights_at(step), losses, self.reference_losses)
        self.sampler.set_weights(weights, step)

    def values(self, step: int) -> dict[str, Any]:
        """Return mixture and routing for a line of metrics and reset the statistics. Every rank must call it.

        Raises:
            CollapsedError: A router has collapsed, and the recipe requests to stop in that case.
        """
        from .routing_statistics import collapsed

        found: dict[str, Any] = {"mixture": {k: round(v, 6) for k, v in self.sampler.weights_at(step).items()}}
        if not self.statistics.layers:  # a dense model
            return found
        layers = self.statistics.per_layer()
        found["routing"] = {key: round(value, 6) for key, value in self.statistics.summary().items()}
        names = ("max_violation", "load_entropy_share", "dead_experts", "importance_cv", "top1_probability")
        found["layers"] = {name: [round(getattr(each, name), 5) for each in layers] for name in names}
        found["layers"]["index"] = [each.layer for each in layers]
        if any(each.part != "ffn" for each in layers):
            found["layers"]["part"] = [each.part for each in layers]
        self.statistics.reset()
        enough = [each for each in layers if each.tokens * each.top_k >= _ENOUGH * each.num_experts]
        for sentence in collapsed(enough):
            self._collapsed(step, sentence)
        return found

    def _collapsed(self, step: int, sentence: str) -> None:
        if self._stop_on_collapse:
            raise CollapsedError(
                f"step {step}: {sentence}.",
                hint="Start a new run with a balance loss (losses: [{name: switch}]), a larger coefficient, or a lower "
                "optimizer.router_lr.",
            )
        router = sentence.partition(" has ")[0]
        if router not in self._warned:
            self._warned.add(router)
            log.warning("step %d: %s", step, sentence)

    def save(self, folder: Path, step: int) -> None:
        """Write the state into the checkpoint of a step."""
        write_text(folder / STATE, json.dumps({"mixture": self.sampler.state_dict(step)}, indent=1) + "\n")
        state = {key: value.detach().cpu().contiguous() for key, value in self.gate.state_dict().items()}
        if state:
            save_tensors(folder / GATE, state)

    def load(self, folder: Path) -> None:
        """Read the state from the checkpoint of a step."""
        with state_errors(str(folder)):
            self.sampler.load_state_dict(json.loads((folder / STATE).read_text(encoding="utf-8"))["mixture"])
            if (folder / GATE).exists():
                self.gate.load_state_dict(safetensors.torch.load_file(folder / GATE, backend="pread"))
