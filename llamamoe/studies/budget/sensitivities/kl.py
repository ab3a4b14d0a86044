"""Measure a converted layer's effect on predictions: the divergence of the model's output from the parent's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ....calibration.compute import MEMORY_BYTES, Compute
from ....calibration.gradients import GradientStore
from ....calibration.text import CalibrationText
from ....calibration.walk import cast_ffn, read_ffn
from ....conversion.layer import convert_layer
from ....conversion.texts import with_clusters
from ....errors import LlamaMoeError
from ....lazy import np, torch
from ....methods.layer import LayerInputs
from ....methods.moe_layer import ConvertedFfn, dense_outputs
from ....models.loading import LOGITS_AT_ONCE
from ....models.streaming import LayerRunner, StreamedModel
from ....progress import Progress
from .base import Sensitivity, Task, pass_flops
from .curves import Curves

HELD_OUT = 5
"""One sequence in this many is held out from the conversion, at least one."""


class OutputKl(Sensitivity):
    """``KL(parent || parent with layer l converted)``, in nats per token, mean over held-out tokens.

    Layer l is converted by the recipe, fitted to its inputs in the dense parent on the first four fifths of
    the sequences; the divergence is measured on (the beginnings of) the last fifth. All changed models are run side by
    side, so that every layer is loaded once: per share L conversions, L (L + 1) / 2 passes of the held-out tokens
    through one layer, L heads, and L hidden states of the held-out tokens, in a file beyond 4 GiB.
    """

    name = "kl"
    summary = "each layer converted alone by the recipe's method; divergence of the output on held-out text"
    reference = "ours"
    needs = "activations"
    unit = "nats per token"
    converts = True

    def measure(self, task: Task) -> Curves:
        """See `Sensitivity.measure`."""
        fit, held_ST = held_out(task.text, task.held_out_tokens)
        spec = task.plans[0].model.spec
        texts = [with_clusters(plan, fit) for plan in task.plans]
        walk = task.walk(fit, _gradients(task, fit))
        streams = _Streams.at_start(task, held_ST)
        for layer in range(spec.num_layers):
            inputs = walk.enter(layer)
            seen = (_seen(inputs, text) for text in texts)
            ffns = [_converted(plan, layer, each) for plan, each in zip(task.plans, seen, strict=True)]
            if layer + 1 < spec.num_layers:
                dense = cast_ffn(read_ffn(walk.model, layer), task.weights_dtype)
                walk.leave(layer, dense_outputs(inputs, dense))
            with torch.no_grad():
                streams.advance(layer, ffns)
            task.progress(Progress("sensitivity", layer + 1, spec.num_layers, "layer"))
        with torch.no_grad():
            found_V = streams.divergences(spec.vocab_size, task)
        damage_BL = found_V.reshape(spec.num_layers, len(task.plans)).T
        wrong = np.flatnonzero(~np.isfinite(damage_BL).all(0))
        if len(wrong):
            raise LlamaMoeError(
                f"layer {wrong[0]}: the converted layer gives NaN or infinite outputs on held-out text."
            )
        return Curves(np.array(task.shares), np.maximum(damage_BL, 0.0))  # rounding can make it negative

    def flops(self, task: Task) -> int:
        """See `Sensitivity.flops`."""
        spec = task.plans[0].model.spec
        count, variants = spec.num_layers, len(task.plans)
        held = held_out(task.text, task.held_out_tokens)[1].size
        passes = held * pass_flops(task.plans[0]) * variants * count * (count + 1) // 2
        heads = 2 * held * spec.vocab_size * spec.hidden_size * (1 + variants * count)
        return sum(plan.calibration.flops for plan in task.plans if plan.calibration) + passes + heads


def held_out(text: CalibrationText, tokens: int) -> tuple[CalibrationText, np.ndarray]:
    """Return the text to fit to, and int64 ``[S, T]`` of other sequences: at most ``tokens``, from the start of each.

    Raises:
        LlamaMoeError: There is only one sequence.
    """
    count, length = text.ids_ST.shape
    kept = max(1, count // HELD_OUT)
    if count - kept < 1:
        raise LlamaMoeError(
            "the calibration text is one sequence, so that none can be held out.",
            hint="Give more --calibration-tokens, or a smaller --calibration-length.",
        )
    first = count - kept
    clusters = None if text.clusters_S is None else text.clusters_S[:first]
    fit = replace(text, ids_ST=text.ids_ST[:first], domains_S=text.domains_S[:first], clusters_S=clusters)
    used = min(length, max(2, tokens // kept))
    return fit, text.ids_ST[first : first + max(1, tokens // used), :used]


def _gradients(task: Task, text: CalibrationText) -> GradientStore | None:
    """Return the parent's gradients, if a method of the recipe needs them."""
    plan = task.plans[0]
    if plan.calibration is None or not plan.calibration.gradients:
        return None
    from ....calibration.gradients import ffn_gradients

    dtype = task.compute.dtype
    return ffn_gradients(
        plan.model,
        torch.from_numpy(text.ids_ST),
        folder=task.folder / "gradients",
        device=task.compute.device,
        compute_dtype=None if dtype == torch.float32 else dtype,
        progress=task.progress,
    )


def _seen(inputs: LayerInputs, text: CalibrationText) -> LayerInputs:
    """Return the inputs with the clusters of one plan's text: plans may have different numbers of experts."""
    if text.clusters_S is None:
        return inputs
    return replace(inputs, clusters_T=torch.from_numpy(text.clusters_S).repeat_interleave(text.ids_ST.shape[1]))


def _converted(plan: Any, layer: int, inputs: LayerInputs) -> ConvertedFfn:
    moe = convert_layer(plan, layer, inputs).moe
    assert moe is not None, "there are inputs"
    return moe


@dataclass
class _Streams:
    """Hidden states of the held-out text in the parent and in every changed model.

    Attributes:
        runner: Runs the parent's layers.
        compute: Device and dtype.
        states_VSTH: float32; the first is the parent's, then layer by layer and plan by plan; only ``filled`` of them
            already differ.
        batch_tokens: Tokens per batch.
        filled: Number of streams in use.
    """

    runner: LayerRunner
    compute: Compute
    states_VSTH: torch.Tensor
    batch_tokens: int
    filled: int = 1

    @classmethod
    def at_start(cls, task: Task, ids_ST: np.ndarray) -> _Streams:
        """Return streams with the parent's embeddings."""
        model, dtype, device = task.plans[0].model, task.weights_dtype, task.compute.device
        read = model.checkpoint.read
        streamed = StreamedModel.of_dense(model, lambda name: read(name).to(dtype), device=device)
        shape = (1 + model.spec.num_layers * len(task.plans), *ids_ST.shape, model.spec.hidden_size)
        count = shape[0] * shape[1] * shape[2] * shape[3]
        states = (
            torch.empty(shape)
            if 4 * count <= MEMORY_BYTES
            else torch.from_file(str(task.folder / "held-out"), shared=True, size=count).view(shape)
        )
        with torch.no_grad():
            streams = cls(LayerRunner(streamed, ids_ST.shape[1]), task.compute, states, task.batch_tokens)
            for part in streams._parts():
                states[0, part] = streams.runner.embed(torch.from_numpy(ids_ST[part])).float().cpu()
        return streams

    def advance(self, layer: int, ffns: Sequence[ConvertedFfn]) -> None:
        """Run every stream through a layer; each of ``ffns`` starts another one in place of the layer's FFN."""
        states, dtype = self.states_VSTH, self.compute.dtype
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.compute.device.type, dtype, enabled=dtype != torch.float32))
            module: Any = stack.enter_context(self.runner.layer(layer))
            for stream in range(1, self.filled):
                self._run(layer, module, stream, stream)
            for ffn in ffns:
                module.mlp.forward = _forward(ffn, self.compute)
                try:
                    self._run(layer, module, 0, self.filled)
                finally:
                    del module.mlp.forward
                self.filled += 1
            self._run(layer, module, 0, 0)
        if not bool(states[0].isfinite().all()):
            raise LlamaMoeError(f"layer {layer}: NaN or infinite hidden states of the dense parent on held-out text.")

    def _run(self, layer: int, module: torch.nn.Module, source: int, target: int) -> None:
        states = self.states_VSTH
        for part in self._parts():
            out = self.runner.run(layer, module, states[source, part].to(self.compute.device))
            states[target, part] = out.float().cpu()

    def divergences(self, vocab_size: int, task: Task) -> np.ndarray:
        """Return float64 ``[V - 1]``: KL from the parent's predictions to each changed model's, nats per token."""
        variants, tokens = len(self.states_VSTH) - 1, self.states_VSTH.shape[1] * self.states_VSTH.shape[2]
        total_V = torch.zeros(variants, dtype=torch.float64)
        flat_VPH = self.states_VSTH.flatten(1, 2)
        step = max(1, LOGITS_AT_ONCE // vocab_size)
        for start in range(0, tokens, step):
            parent_PC = self._log_probabilities(flat_VPH[0, start : start + step])
            for v in range(variants):
                changed_PC = self._log_probabilities(flat_VPH[1 + v, start : start + step])
                total_V[v] += float((parent_PC.exp() * (parent_PC - changed_PC)).sum(dtype=torch.float64))
            task.progress(Progress("divergence", min(start + step, tokens), tokens, "token"))
        return (total_V / tokens).numpy()

    def _log_probabilities(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        return self.runner.logits(hidden_PH.to(self.compute.device)).log_softmax(-1)

    def _parts(self) -> Iterator[slice]:
        count, length = self.states_VSTH.shape[1:3]
        step = max(1, self.batch_tokens // length)
        return (slice(start, start + step) for start in range(0, count, step))


def _forward(ffn: ConvertedFfn, compute: Compute) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the converted layer as the forward function of an ``mlp``."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat_TH = x.reshape(-1, x.shape[-1])
        inputs = LayerInputs(flat_TH, flat_TH.new_ones(len(flat_TH)), compute.device, compute.dtype)
        with torch.autocast(compute.device.type, enabled=False):
            return torch.cat(list(ffn.outputs(inputs))).reshape(x.shape).to(x.dtype)

    return forward
