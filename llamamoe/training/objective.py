"""Compute the loss of a micro-batch: language modelling, distillation, and balance of the routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ..lazy import torch
from .distillation import Distillation
from .dynamics import Dynamics
from .loss_head import LossHead, next_token_labels
from .losses.base import LossContext, RoutingLoss
from .metrics import Sums
from .routing import RouterTap, Routing


@dataclass(frozen=True)
class Scale:
    """The divisors of a micro-batch's sums, with which all micro-batches of a step add up to the global loss.

    Attributes:
        targets: Predicted tokens of a global batch.
        tokens: Tokens of a global batch.
        turns: Micro-batches of a step on one rank.
        world: Ranks with different data; gradients are averaged over them, so that losses are multiplied by it.
    """

    targets: int
    tokens: int
    turns: int
    world: int = 1


class Objective:
    """The loss of a micro-batch, with all its terms.

    Args:
        head: Computes token losses from the model's hidden states.
        tap: Records the routers' decisions.
        losses: Losses on the routing.
        context: Context of those losses.
        distillation: Terms from the parent; None for language modelling alone.
        dynamics: Called for every micro-batch.
        sums: Sums of every term for the metrics.
        scale: See `Scale`.
        max_steps: Steps of the run, for schedules.
    """

    def __init__(
        self,
        head: LossHead,
        tap: RouterTap,
        losses: Sequence[RoutingLoss],
        context: LossContext,
        distillation: Distillation | None,
        dynamics: Dynamics,
        sums: Sums,
        scale: Scale,
        max_steps: int,
    ) -> None:
        self.head, self._tap, self._losses, self._context = head, tap, tuple(losses), context
        self._distillation, self._dynamics, self._sums = distillation, dynamics, sums
        self._scale, self._max_steps = scale, max_steps
        self._needs_inputs = any(loss.needs_inputs for loss in losses)

    def __call__(self, model: Any, inputs: Mapping[str, Any], step: int) -> torch.Tensor:
        """Return a scalar whose sum over the micro-batches of a step, divided by ``world``, is the global loss.

        Args:
            model: The model, wrapped or not.
            inputs: ``input_ids`` and perhaps ``position_ids`` int64 ``[B, T]``, ``domains`` int64 ``[B]``, ``place`` (step, micro-batch).
            step: Finished optimiser steps.
        """
        ids_BT = inputs["input_ids"]
        self._dynamics.begin_micro_batch(*inputs["place"])
        batch = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs} | {"use_cache": False}
        labels_BT = next_token_labels(ids_BT)
        distillation, scale = self._distillation, self._scale
        recording = distillation.recording(batch, step, self._max_steps) if distillation else nullcontext(None)
        with recording as recorded, self._tap.armed(inputs=self._needs_inputs) as routings:
            losses = self.head(model, batch, labels_BT, recorded.target if recorded else None)
        terms = {"lm": losses.nll_sum / scale.targets}
        weights = {"lm": 1.0}
        if distillation is not None and recorded is not None:
            weights |= distillation.weights(step, self._max_steps)
            if losses.kl_sum is not None:
                terms["kl"] = losses.kl_sum / scale.targets
            terms |= {name: total / scale.tokens for name, total in recorded.sums().items()}
        total = sum((weights[name] * value for name, value in terms.items()), start=terms["lm"] * 0.0)
        for loss in self._losses:
            value = self._routing_loss(loss, routings)
            terms[loss.name] = value
            total = total + loss.options.coefficient * value.to(total.device)
        self._dynamics.observe(routings)
        for name, value in terms.items():
            self._sums.add(name, value)
        self._sums.add_domains(inputs["domains"], losses.nll_BT.sum(1), labels_BT.shape[1] - 1)
        return total * scale.world

    def _routing_loss(self, loss: RoutingLoss, routings: Sequence[Routing]) -> torch.Tensor:
        """Return the routing losses, scaled so that the terms of all micro-batches and ranks add up."""
        value = loss.loss(routings, self._context)
        if loss.linear:
            return value / self._scale.tokens
        return value / (self._scale.turns * self._scale.world)

    def terms(self, scalars: Mapping[str, float], steps: int) -> dict[str, Any]:
        """Return the summed terms as means over ``steps`` steps, without weights: ``terms: {lm: ..., switch: ...}``."""
        return {"terms": {name: value / steps for name, value in sorted(scalars.items())}}
