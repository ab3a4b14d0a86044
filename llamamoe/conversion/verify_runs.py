"""Run a conversion and its parent on one text and compare their logits, with one layer of each in memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architectures.moe_layout import Heads, Neurons, Origin, Router
from ..checkpoint.base import Checkpoint
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.tensors import torch_dtype
from ..checkpoint.whole_pairs import as_causal
from ..lazy import torch
from ..models.streaming import StreamedModel
from ..progress import Progress, ProgressCallback
from .plan import SplitPlan
from .verify_files import check_finite

RECEIPT_TEXT = """\
A mixture of experts keeps many small networks and uses a few of them for each word. In 1991 the idea was tried \
on vowels; today it carries models of 1,000,000,000,000 parameters. The router looks at a hidden state and says: \
you, and you; the others rest. def top_k(scores, k): return sorted(range(len(scores)), key=lambda i: -scores[i])[:k] \
# O(n log n). "Is it exact?" she asked. \u201cWith all of them selected, yes \u2014 to the last bits of a float.\u201d \
Every neuron has one home: no one is lost, no one is counted twice. \u03a3 w\u1d62 E\u1d62(x) = y. \
Le routeur choisit; die Experten rechnen; 専門家が答える.
"""
"""The text of every receipt: prose, figures, code, and letters beyond ASCII."""
MAX_TOKENS = 128


@dataclass
class _Taps:
    """Inputs and outputs of the FFNs of one run, per layer."""

    inputs: dict[int, torch.Tensor]
    outputs: dict[int, torch.Tensor]

    def attach(self, layer: int, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        block = getattr(module, names[0])

        def record(_: Any, args: tuple[Any, ...], output: Any) -> None:
            self.inputs[layer] = args[0].detach().clone()
            self.outputs[layer] = (output[0] if isinstance(output, tuple) else output).detach().clone()
            handle.remove()

        handle = block.register_forward_hook(record)


@dataclass
class Measured:
    """Differences between the runs; see `llamamoe.conversion.verify.Verification`."""

    tokens: int
    origin: str
    reference: str
    equal: float | None = None
    stored: float | None = None
    largest: float = 0.0
    errors: list[tuple[int, float]] = field(default_factory=list)


def compare_logits(plan: SplitPlan, converted: SafetensorsCheckpoint, progress: ProgressCallback) -> Measured:
    """Run both models; an exact conversion twice, see `llamamoe.conversion.verify`.

    Raises:
        VerificationError: Transformers cannot load one of the two, reads the parent differently than llamamoe, or
            weights that the conversion made are not finite.
    """
    ids, origin = receipt_tokens(converted.path, plan.model.spec.vocab_size)
    layers, claims = plan.model.spec.num_layers, plan.parity == "exact"
    parent_taps = _Taps({}, {})
    measured = Measured(ids.numel(), origin, _reference(plan))

    def step(stage: str) -> Any:
        return lambda layer, module: progress(Progress(stage, layer + 1, layers, "layer"))

    def compare(stage: str) -> Any:
        def after(layer: int, module: torch.nn.Module) -> None:
            step(stage)(layer, module)
            if layer not in plan.layout.dense_layers:
                measured.errors.append((layer, _layer_error(plan, module, parent_taps, layer)))

        return after

    parent = _run_parent(plan, ids, lambda i, m: parent_taps.attach(i, m, ("mlp",)), step("run parent"))
    if torch.isfinite(parent).all():
        check_finite(plan, converted)
        if plan.target.routed:
            stage = "run with equal weights"
            equal = _converted(plan, converted, zero_router=True)
            after = compare(stage) if claims else step(stage)
            measured.equal = _difference(parent, equal.logits(ids, after_layer=after))
        as_configured = not claims or plan.layout.copies > 1
        if as_configured or plan.recipe.router_scale == "hard":
            taps, stage = _Taps({}, {}), "run as stored"
            stored = _converted(plan, converted, everyone=not as_configured).logits(
                ids,
                before_layer=lambda i, m: taps.attach(i, m, plan.target.ffn_modules),
                after_layer=step(stage) if claims else compare(stage),
            )
            measured.stored = _difference(parent, stored)
            measured.largest = _largest_router_logit(plan, converted, taps)
    return measured


def receipt_tokens(folder: Path, vocab_size: int) -> tuple[torch.Tensor, str]:
    """Return int64 ``[1, T]``: `RECEIPT_TEXT` in the folder's tokens, or seeded random ids if it has no tokenizer."""
    from ..checkpoint.tokenizer_loading import load
    from ..errors import CheckpointError

    try:
        ids = load(folder)(RECEIPT_TEXT).input_ids[:MAX_TOKENS]
        if len(ids) > 1 and max(ids) < vocab_size:
            return torch.tensor([ids]), "text"
    except CheckpointError:
        pass  # no tokenizer, or one that needs a missing package or code
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, MAX_TOKENS), generator=generator), "random ids"


def _reference(plan: SplitPlan) -> str:
    """Return how the parent is opened and run, for the receipt."""
    run = f"weights rounded to {plan.dtype}, run in F32"
    if isinstance(plan.model.checkpoint, SafetensorsCheckpoint):
        return f"the parent as transformers' from_pretrained loads it, {run}"
    return f"the GGUF file as llamamoe reads it (not read by another program), {run}"


def _run_parent(plan: SplitPlan, ids: torch.Tensor, before_layer: Any, after_layer: Any) -> torch.Tensor:
    """Return the parent's logits; nothing of it is left in memory."""
    checkpoint, dtype = plan.model.checkpoint, torch_dtype(plan.dtype)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        streamed = StreamedModel.of_dense(plan.model, lambda name: checkpoint.read(name).to(dtype))
        return streamed.logits(ids, before_layer=before_layer, after_layer=after_layer)
    from .reference import Reference

    reference = Reference(plan.model, plan.dtype)
    logits = reference.logits(ids, before_layer=before_layer, after_layer=after_layer)
    del reference
    gc.collect()  # modules and accelerate's hooks refer to one another
    return logits


def _converted(
    plan: SplitPlan, converted: Checkpoint, *, everyone: bool = True, zero_router: bool = False
) -> StreamedModel:
    """Open the output as configured, or with ``everyone`` selected and the routed sum times the parity factor."""
    part = plan.model.part
    rest = part.rest if part else ()
    names = {(part.text_name(t.name) if part else t.name): t for t in plan.tensors if t.name not in rest}
    factor = plan.layout.combine.parity_factor if everyone else 1.0

    def read(name: str) -> torch.Tensor:
        tensor, origin = converted.read(names[name].name), names[name].origin
        if zero_router and isinstance(origin, Router):
            return tensor.new_zeros(tensor.shape)
        if isinstance(origin, Neurons) and origin.turned:
            tensor = tensor.transpose(1, 2).contiguous()
        if factor != 1.0 and _routed_output(origin):
            return tensor.float() * factor
        return tensor

    config = plan.config
    if part:  # the head of the whole does not scale logits
        text = as_causal(config["text_config"])
        config = text | {key: 1.0 for key in ("logits_scaling", "logit_scale") if key in text}
    config = config | ({plan.target.top_k_key: plan.layout.num_experts} if everyone else {})
    return StreamedModel(
        config, names, read, lambda layer: plan.target.one_layer(dense=layer in plan.layout.dense_layers)
    )


def _routed_output(origin: Origin) -> bool:
    """Return whether a tensor is multiplied with the factor of routed outputs."""
    if isinstance(origin, Heads):
        return origin.part == "output"
    return isinstance(origin, Neurons) and origin.part == "down" and origin.expert != "shared"


def _difference(parent: torch.Tensor, converted: torch.Tensor) -> float:
    """Return max abs difference / max abs value; infinite if any value is not finite."""
    value = float((parent - converted).abs().max() / parent.abs().max())
    return value if value == value else float("inf")


def _layer_error(plan: SplitPlan, module: torch.nn.Module, taps: _Taps, layer: int) -> float:
    x, want = taps.inputs[layer], taps.outputs[layer] * plan.target.residual_scale(plan.model.spec)
    have = 0
    for name in plan.target.ffn_modules:
        block = getattr(module, name, None)
        if block is not None:
            output = block(x)
            have = have + (output[0] if isinstance(output, tuple) else output)
    return _difference(want, have.reshape(want.shape))  # type: ignore[attr-defined]


def _largest_router_logit(plan: SplitPlan, converted: Checkpoint, taps: _Taps) -> float:
    rows = {t.layer: t.name for t in plan.tensors if t.origin == Router()}
    found = 0.0
    for layer, name in rows.items():
        x = taps.inputs[layer or 0]
        found = max(found, float((x.reshape(-1, x.shape[-1]) @ converted.read(name).float().T).abs().max()))
    return found
