"""Learn assignment and router of all layers together, against the parent's own predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..architectures.dense_checkpoint import DenseModel
from ..calibration.compute import Compute
from ..calibration.walk import cast_ffn, read_ffn
from ..errors import LlamaMoeError
from ..lazy import np, torch
from ..methods.solvers.learned_assignment import size_of
from ..models.streaming import LayerRunner, StreamedModel
from ..progress import Progress, ProgressCallback, ignore_progress
from .assignment import Assignment
from .cost import held_out_sequences
from .distance import divergence
from .gated import GatedFfn
from .layers import AlignedLayer, Learned, Start, moved
from .recipe import AlignmentOptions
from .states import States

SECONDS_BETWEEN_STATES = 120.0
WARM_UP = 1 / 20
"""Share of the steps in which the rates rise."""


@dataclass(frozen=True)
class Aligned:
    """The result of an alignment.

    Attributes:
        layers: One for each layer that was given.
        facts: For the receipt: KL on held-out text at the start and at every check, moved neurons, and sizes.
    """

    layers: dict[int, AlignedLayer]
    facts: dict[str, Any]


class Alignment:
    """Minimises ``KL(parent || student)`` of the next token over assignment, router and FFN weights of all layers together.

    The student is the parent with its FFNs' neurons gated: those of the k experts whose router logits are largest, and
    the shared ones. Forward all choices are hard: partitions are exactly balanced and every token selects k experts, so
    that what is measured is what is written. Backward they are soft: neurons by the transport plan
    ``Sinkhorn(A / tau)`` with the same sizes, tokens by the threshold function of `soft_top_k`; both temperatures fall.
    The rest of the model is shared with the parent and held once; where FFN weights learn, the parent's are kept as
    well.

    Of the start and ``checks`` later states, the one with the lowest KL on held-out text is kept: the first
    sequences of the text, which are not trained on.

    Reference: after DOT-MoE (arXiv:2606.01666); straight-through estimates as in Bengio et al. (arXiv:1308.3432).

    Time: two forward passes of the dense model and a backward pass that computes no weight gradients, for each token:
    about 3 multiply-adds per parameter, 4 if FFN weights learn. Memory: the model in the compute dtype, 16 bytes for
    each FFN weight that learns, and for a step's tokens two F-wide activations in each layer.

    Args:
        model: The dense parent.
        starts: The layers that are split; the others stay dense.
        ids_ST: int64 ``[S, T]``, the text, in an order that mixes its domains.
        options: Rates, temperatures, steps.
        compute: Device and dtype of large products.
        weights_dtype: The dtype that weights are rounded to, because they will be stored in it.
        folder: Folder for the state, from which a stopped run resumes with byte-identical results; None keeps no state.
        progress: Called after every step.

    Raises:
        LlamaMoeError: There is too little text.
    """

    def __init__(
        self,
        model: DenseModel,
        starts: Mapping[int, Start],
        ids_ST: np.ndarray,
        options: AlignmentOptions,
        compute: Compute,
        *,
        weights_dtype: torch.dtype,
        folder: Path | None = None,
        progress: ProgressCallback = ignore_progress,
    ) -> None:
        self.options, self.progress = options, progress
        self.vocab_size, self.hidden_size = model.spec.vocab_size, model.spec.hidden_size
        sequences, length = ids_ST.shape
        held_out = held_out_sequences(sequences, length)
        self.held_out_ST, self.ids_ST = (torch.from_numpy(part) for part in (ids_ST[:held_out], ids_ST[held_out:]))
        self.batch = max(1, min(options.batch // length, len(self.ids_ST)))
        self.steps = len(self.ids_ST) // self.batch
        checkpoint = model.checkpoint
        streamed = StreamedModel.of_dense(
            model,
            lambda name: checkpoint.read(name).to(weights_dtype),
            device=compute.device,
            dtype=compute.dtype,
        )
        with torch.no_grad():
            self.runner = LayerRunner(streamed, length)
        self.layers: dict[int, Learned] = {}
        self.modules = self.runner.hold(
            lambda layer, module: self._gate(model, layer, module, starts, weights_dtype, compute)
        )
        self.optimizer = torch.optim.Adam(self._groups(), fused=True)
        self.states = None if folder is None else States(folder, self.layers, self.optimizer)

    def _gate(
        self,
        model: DenseModel,
        layer: int,
        module: Any,
        starts: Mapping[int, Start],
        weights_dtype: torch.dtype,
        compute: Compute,
    ) -> None:
        """Put a gated FFN in place of the layer's own, which is released."""
        if layer not in starts:
            return
        start = starts[layer]
        module.mlp = GatedFfn(cast_ffn(read_ffn(model, layer), weights_dtype), compute.device, compute.dtype)
        assignment = Assignment.of(start.partition, self.options.margin, compute.device)
        rows = start.partition.router_NH
        rows = torch.zeros(0, model.spec.hidden_size) if rows is None else rows
        rows = rows.to(compute.device, torch.float32, copy=True)
        scales = weights = None
        if self.options.weights == "scales":
            scales = torch.ones(model.spec.intermediate_size, device=compute.device)
        elif self.options.weights == "ffn":
            first = start.layer.matrices or module.mlp.parent
            weights = tuple(w.to(compute.device, torch.float32, copy=True) for w in first)
        start = replace(
            start, layer=AlignedLayer(start.partition)
        )  # the starting weights are not kept beside the learned ones
        self.layers[layer] = Learned(start, assignment, rows, scales, weights, module.mlp)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.options
        # Adam's step on a sum over H inputs: the best rates at hidden sizes 64 and 576 differed by their ratio
        weights = 1 / self.hidden_size if options.lr_weights is None else options.lr_weights
        whole = sum(self._schedule(step) for step in range(self.steps))
        rates = {
            "logits": min(options.lr_assignment, options.reach * options.margin / whole),
            "scales": options.lr_scale,
            "rows": options.lr_router,
        }
        groups = []
        for each in self.layers.values():
            for name, parameter in each.parameters.items():
                size = size_of(parameter) if name not in ("logits", "scales") else 1.0
                rate = rates.get(name, weights) * size
                parameter.requires_grad_(rate > 0)
                groups.append({"params": [parameter], "lr": rate, "rate": rate})
        return groups

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Aligned:
        """Run all steps and return what was learned.

        Raises:
            LlamaMoeError: A loss or a logit is not finite.
        """
        options, first = self.options, 0
        checks = [self.steps * i // options.checks for i in range(options.checks + 1)]
        record: list[tuple[int, float]] = []
        best: dict[int, AlignedLayer] = {}
        if self.states is not None and (found := self.states.load()) is not None:
            first, record, best = found
        for step in range(first, self.steps + 1):
            if step in checks and not any(step == done for done, _ in record):
                value = _finite(self.held_out(), step)
                if not any(value >= before for _, before in record):
                    best = {layer: each.now for layer, each in self.layers.items()}
                record.append((step, value))
            if self.states is not None and (step in checks or self.states.due(SECONDS_BETWEEN_STATES)):
                self.states.save(step, record, best)
            if step < self.steps:
                loss = self.step(step)
                self.progress(
                    Progress("align", step + 1, self.steps, "step", f"KL {loss:.3f}, held out {record[-1][1]:.3f}")
                )
        return Aligned(best, self._facts(record, best))

    def step(self, step: int) -> float:
        """Take one step of Adam and return the mean KL of its tokens."""
        options, done = self.options, step / max(self.steps - 1, 1)
        tau = options.tau_start * (options.tau_end / options.tau_start) ** done
        temperature = options.router_start * (options.router_end / options.router_start) ** done
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._schedule(step)
        ids = self.ids_ST[step * self.batch : (step + 1) * self.batch]
        self.optimizer.zero_grad()
        loss = self.loss(ids, temperature, learning=True) / ids.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        value = _finite(float(loss.detach()), step)
        for each in self.layers.values():
            if each.assignment.logits_FC.requires_grad:
                assert each.one_hot_FC.grad is not None
                each.assignment.pull_back(each.one_hot_FC.grad, tau)
        self.optimizer.step()
        if options.lr_assignment and ((step + 1) % options.refresh == 0 or step + 1 == self.steps):
            for each in self.layers.values():
                _finite(float(each.assignment.logits_FC.detach().sum()), step + 1, "a sum of an assignment's logits")
                each.assignment.assign()
        return value

    def _schedule(self, step: int) -> float:
        """Return the share of the rates at a step: a linear warm-up, then half a cosine."""
        rise = min(1.0, (step + 1) / (WARM_UP * self.steps))
        return float(rise * (1 + math.cos(math.pi * step / self.steps)) / 2)

    def loss(self, ids_BT: torch.Tensor, temperature: float, *, learning: bool) -> torch.Tensor:
        """Return the KL divergence from the parent, summed over the tokens."""
        with torch.no_grad():
            for each in self.layers.values():
                each.ffn.choices = None
            parent = self._hidden(ids_BT)
        for each in self.layers.values():
            each.choose(temperature, learning=learning)
        student = self._hidden(ids_BT)
        return divergence(student, parent, self.runner.logits, self.vocab_size)

    def held_out(self) -> float:
        """Return the mean KL over the held-out tokens."""
        with torch.no_grad():
            parts = torch.split(self.held_out_ST, self.batch)
            return sum(float(self.loss(ids, 1.0, learning=False)) for ids in parts) / self.held_out_ST.numel()

    def _hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.runner.embed(ids_BT)
        for index, module in enumerate(self.modules):
            hidden = self.runner.run(index, module, hidden)
        return hidden.flatten(0, 1)

    def _facts(self, record: list[tuple[int, float]], best: Mapping[int, AlignedLayer]) -> dict[str, Any]:
        kept = min(record, key=lambda each: each[1])
        return {
            "tokens": self.steps * self.batch * self.ids_ST.shape[1],
            "held_out_tokens": self.held_out_ST.numel(),
            "steps": self.steps,
            "held_out_kl": [{"step": step, "kl": value} for step, value in record],
            "kept_step": kept[0],
            "moved_neurons": {
                str(layer): moved(self.layers[layer].start.partition, each.partition) for layer, each in best.items()
            },
        }


def _finite(value: float, step: int, what: str = "the distance to the parent's predictions") -> float:
    """Return a number, refusing one with which learning cannot continue.

    Raises:
        LlamaMoeError: It is NaN or infinite.
    """
    if not math.isfinite(value):
        raise LlamaMoeError(
            f"{what} is {value} at step {step} of the alignment.",
            hint="Try --compute-dtype float32, or smaller rates (align.lr_weights); if that does not help, the parent's "
            "weights are broken.",
        )
    return value
