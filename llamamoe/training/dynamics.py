"""The state of a run that changes beside the weights: the gate's noise, selection biases, the mixture; and what routers did."""

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
"""Assignments per expert, on average, from which on a window tells whether a router has collapsed."""


class CollapsedError(LlamaMoeError):
    """A router uses few of its experts, and the recipe says to stop then."""


class Dynamics:
    """The moving parts of a run and their state.

    Args:
        gate: How tokens are routed while training.
        balancing: Moves selection biases; None if nothing does.
        statistics: What routers did since the last line of metrics.
        sampler: The mixture.
        update: How the mixture follows held-out losses.
        reference_losses: What the update compares them with.
        stop_on_collapse: Raise instead of warning.
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
        """Return what the gate learns beside the routers' rows."""
        return list(self.gate.parameters())

    def begin_micro_batch(self, step: int, micro_batch: int) -> None:
        """The gate's noise depends on step and micro-batch only, so that neither a resume nor the ranks change it."""
        self.gate.set_step(step, micro_batch)

    def observe(self, routings: Sequence[Routing]) -> None:
        """Count what the routers did with a micro-batch."""
        self.statistics.add(routings)
        if self.balancing is not None:
            self.balancing.observe(routings)

    def clip_gate_gradients(self, max_norm: float) -> float:
        """Average the gate's gradients over ranks and clip them: they belong to no wrapped module.

        Args:
            max_norm: Largest norm of all of them together; 0: they are not clipped.

        Returns:
            Their norm before; 0 if the gate learns nothing.
        """
        self.gate.average_gradients()
        learned = [each for each in self.gate_parameters() if each.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(learned, max_norm or float("inf"))) if learned else 0.0

    def after_optimizer_step(self) -> None:
        """Move the selection biases; forget the gradients of what the gate learns, which the model's own zeroing misses."""
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
        """Mixture and routing for a line of metrics; the statistics begin anew. Every rank must call it.

        Raises:
            CollapsedError: A router has collapsed, and the recipe says to stop then.
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
        layer = sentence.split(":")[0]
        if layer not in self._warned:
            self._warned.add(layer)
            log.warning("step %d: %s", step, sentence)

    def save(self, folder: Path, step: int) -> None:
        """Write the state into the checkpoint of a step."""
        write_text(folder / STATE, json.dumps({"mixture": self.sampler.state_dict(step)}, indent=1) + "\n")
        state = {key: value.detach().cpu().contiguous() for key, value in self.gate.state_dict().items()}
        if state:
            save_tensors(folder / GATE, state)

    def load(self, folder: Path) -> None:
        """Read it back."""
        with state_errors(str(folder)):
            self.sampler.load_state_dict(json.loads((folder / STATE).read_text(encoding="utf-8"))["mixture"])
            if (folder / GATE).exists():
                self.gate.load_state_dict(safetensors.torch.load_file(folder / GATE, backend="pread"))
