"""``llamamoe.verify``: does a converted checkpoint compute what its parent computes?

Both are run by transformers' own classes with one layer in memory (`llamamoe.streaming`), in float32, with every
expert selected. The converted one runs twice: with its router rows set to zero (all weights equal: the claim of
exactness), and with the router as it is stored (what a hard router leaves of it).

A conversion that claims nothing (repaired, pruned, partly re-initialised) runs too, and must give finite logits; how
far they are from the parent's is information. What it does keep of the parent's neurons is checked bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .assembly import torch_dtype
from .checkpoint.base import Checkpoint
from .checkpoint.reader import SafetensorsCheckpoint
from .dense import understand
from .errors import RefusedError, VerificationError
from .hub import locate, open_checkpoint
from .inventory import Hashes, check_files, check_finite, check_neurons, check_weights
from .preflight import RECIPE_FILE
from .progress import Progress, ProgressCallback, ignore_progress
from .streaming import StreamedModel
from .targets.base import Neurons, Router, Target

if TYPE_CHECKING:
    import torch

    from .plan import SplitPlan

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
EQUAL_TOLERANCE = 1e-5
HARD_TOLERANCE = 2e-4
ROUNDED_TOLERANCE = 2e-2
HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Verification:
    """Differences between a conversion and its parent, all experts selected.

    Attributes:
        equal_weights: max abs logit difference / max abs logit, router rows zero; None if the conversion makes
            no claim of exactness.
        equal_tolerance: What `equal_weights` may be.
        as_stored: The same with the router as stored; None for a soft router. Where experts are copies, with the
            configured top-k, for which they are exact too.
        stored_tolerance: What `as_stored` may be.
        largest_logit: Largest absolute router logit on the text, router as stored.
        layer_error: Per MoE layer, max abs difference of the FFN outputs on the parent's own FFN inputs over the
            largest abs output; the last number of the pair (layer, error). All experts at equal weights; the
            configured top-k and the router as stored if no exactness is claimed.
        parity_factor: What routed outputs were multiplied by for the comparison.
        reference: What the parent was compared as.
        num_tokens: Tokens of the text.
        tokens: Where the text comes from: ``"text"`` or ``"random ids"`` (no tokenizer).
        neurons_checked: Layers whose neurons were found to be the parent's, by their bits (see `kept`).
        passed: Whether everything holds.
        note: Why nothing could be compared; empty if it could.
        kept: What was looked for: ``"neurons"``, ``"gate_up"`` (repair changed the down projections), ``"nothing"``.
        all_experts: As `equal_weights`, for a conversion that claims no exactness: information, no test.
        as_configured: The same with the configured top-k and the router as stored; it must only be finite.
        copied_checked: Tensors outside the experts found to be the parent's, bit for bit.
        hashed_checked: Tensors, experts and routers included, whose SHA-256 is that of what was written.
        unproven: Why no hashes could be compared; empty if they were.
    """

    equal_weights: float | None
    equal_tolerance: float
    as_stored: float | None
    stored_tolerance: float
    largest_logit: float
    layer_error: tuple[tuple[int, float], ...]
    parity_factor: float
    reference: str
    num_tokens: int
    tokens: str
    neurons_checked: int
    passed: bool
    note: str = ""
    kept: str = "neurons"
    all_experts: float | None = None
    as_configured: float | None = None
    copied_checked: int = 0
    hashed_checked: int = 0
    unproven: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"layer_error": [list(pair) for pair in self.layer_error]}


def verify(out: str | Path, against: str | Path, *, progress: ProgressCallback = ignore_progress) -> Verification:
    """Check a converted checkpoint against the dense one that it was made from.

    Names, shapes, dtypes and configuration must be those of the recipe in ``out``; what is taken over from the parent
    must be the parent's, and every neuron must be found exactly once, bit for bit; all weights must have the SHA-256 in
    the receipt, and be finite; the logits must agree. A receipt that is missing is told in the result. Of a conversion that claims less
    only what it claims is asked for (see `llamamoe.inventory.check_neurons`), and finite logits.

    Args:
        out: A folder that `llamamoe.split` wrote.
        against: Its parent: folder, ``.gguf`` file or hub id.
        progress: Told after every layer.

    Raises:
        RefusedError: One of the two cannot be read, or ``out`` carries no recipe.
        VerificationError: Something does not agree; the message says what and by how much.
    """
    from .plan import plan_split
    from .recipe import load_recipe

    folder = Path(out).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        raise RefusedError(
            f"{folder} holds no {RECIPE_FILE}, so it was not written by llamamoe.",
            hint="Give the folder that `llamamoe split` made.",
        )
    location = locate(against)
    tokenizer = folder if location.path.is_file() else None  # a GGUF's own may be one that cannot be rebuilt
    model = understand(open_checkpoint(location, tokenizer=tokenizer))
    plan = plan_split(model, load_recipe(folder / RECIPE_FILE))
    result = verify_conversion(plan, folder, Hashes.of_receipt(folder), progress)
    if not result.passed:
        raise VerificationError(f"{folder} cannot be verified: {result.note}.")
    return result


def verify_conversion(
    plan: SplitPlan, folder: Path, hashes: Hashes, progress: ProgressCallback = ignore_progress
) -> Verification:
    """Like `verify`, for a plan and hashes at hand and a folder that need not be published yet."""
    converted = SafetensorsCheckpoint(folder)
    check_files(plan, converted)
    layers = [i for i in range(plan.model.spec.num_layers) if i not in plan.layout.dense_layers]
    checked = 0
    if plan.kept != "nothing":
        for done, layer in enumerate(layers, start=1):
            check_neurons(plan, converted, layer)
            checked += 1
            progress(Progress("check neurons", done, len(layers), "layer"))
    result = _check_logits(plan, converted, checked, progress)
    # last: what the checks before find, they name more precisely than a hash can
    weights = check_weights(plan, converted, hashes, progress)
    return replace(result, copied_checked=weights.copied, hashed_checked=weights.hashed, unproven=weights.unproven)


# ---- logits -------------------------------------------------------------------------------------------------------


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
class _Measured:
    """What the runs gave; see `Verification`."""

    equal: float | None = None
    stored: float | None = None
    largest: float = 0.0
    errors: list[tuple[int, float]] = field(default_factory=list)


def _check_logits(
    plan: SplitPlan,
    converted: SafetensorsCheckpoint,
    neurons: int,
    progress: ProgressCallback,
) -> Verification:
    import torch

    ids, origin = receipt_tokens(converted.path, plan.model.spec.vocab_size)
    layers, claims = plan.model.spec.num_layers, plan.parity == "exact"
    parent_taps, measured = _Taps({}, {}), _Measured()

    def step(stage: str) -> Any:
        return lambda layer, module: progress(Progress(stage, layer + 1, layers, "layer"))

    def compare(stage: str) -> Any:
        def after(layer: int, module: torch.nn.Module) -> None:
            step(stage)(layer, module)
            if layer not in plan.layout.dense_layers:
                measured.errors.append((layer, _layer_error(plan.target, module, parent_taps, layer)))

        return after

    parent = _parent(plan).logits(
        ids, before_layer=lambda i, m: parent_taps.attach(i, m, ("mlp",)), after_layer=step("run parent")
    )
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
    return _judge(plan, measured, ids.numel(), origin, neurons)


def _judge(plan: SplitPlan, measured: _Measured, num_tokens: int, origin: str, neurons: int) -> Verification:
    exact = plan.dtype == "F32" or plan.layout.combine.bake_is_exact
    equal_tolerance = EQUAL_TOLERANCE if exact else ROUNDED_TOLERANCE
    stored_tolerance = max(equal_tolerance, HALF_TOLERANCE if plan.dtype == "F16" else HARD_TOLERANCE)
    claims = plan.parity == "exact"
    equal, stored = measured.equal, measured.stored
    if claims and ((equal or 0.0) > equal_tolerance or (stored or 0.0) > stored_tolerance):
        _raise_inexact(measured, equal_tolerance, stored_tolerance)
    if stored == math.inf:
        raise VerificationError(
            "the logits are not finite with the configured top-k, although the parent's are.",
            hint="Weights that changed since the conversion do this; otherwise please report it.",
        )
    compared = equal is not None or stored is not None
    return Verification(
        equal_weights=equal if claims else None,
        equal_tolerance=equal_tolerance,
        as_stored=stored if claims else None,
        stored_tolerance=stored_tolerance,
        largest_logit=measured.largest,
        layer_error=tuple(measured.errors),
        parity_factor=plan.layout.combine.parity_factor,
        reference=f"the parent's weights rounded to {plan.dtype}, both run in F32",
        num_tokens=num_tokens,
        tokens=origin,
        neurons_checked=neurons,
        passed=compared,
        note="" if compared else "the parent's own logits are not finite, so there is nothing to compare with",
        kept=plan.kept,
        all_experts=None if claims or equal == math.inf else equal,
        as_configured=None if claims else stored,
    )


def _raise_inexact(measured: _Measured, equal_tolerance: float, stored_tolerance: float) -> NoReturn:
    worst = max(measured.errors, key=lambda pair: pair[1], default=(0, 0.0))
    stored = measured.stored
    raise VerificationError(
        f"with all experts selected the logits differ from the parent's by {measured.equal:.2e} of the largest one at "
        f"equal weights (allowed {equal_tolerance:.0e})"
        + (f" and by {stored:.2e} as stored (allowed {stored_tolerance:.0e})" if stored is not None else "")
        + f"; the worst layer is {worst[0]} with {worst[1]:.2e}.",
        hint="Weights that changed since the conversion do this; otherwise please report it.",
    )


def receipt_tokens(folder: Path, vocab_size: int) -> tuple[torch.Tensor, str]:
    """int64 ``[1, T]``: `RECEIPT_TEXT` in the folder's tokens, or seeded random ids if it has no tokenizer."""
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(RECEIPT_TEXT).input_ids[:MAX_TOKENS]
        if len(ids) > 1 and max(ids) < vocab_size:
            return torch.tensor([ids]), "text"
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        pass  # no tokenizer, or one that needs a package or code that is not here
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, MAX_TOKENS), generator=generator), "random ids"


def _parent(plan: SplitPlan) -> StreamedModel:
    checkpoint = plan.model.checkpoint
    dtype = torch_dtype(plan.dtype)
    return StreamedModel.of_dense(plan.model, lambda name: checkpoint.read(name).to(dtype))


def _converted(
    plan: SplitPlan, converted: Checkpoint, *, everyone: bool = True, zero_router: bool = False
) -> StreamedModel:
    """The output as it is configured, or with ``everyone`` selected and the routed sum times the parity factor."""
    origins = {tensor.name: tensor.origin for tensor in plan.tensors}
    factor = plan.layout.combine.parity_factor if everyone else 1.0

    def read(name: str) -> torch.Tensor:
        tensor, origin = converted.read(name), origins[name]
        if zero_router and isinstance(origin, Router):
            return tensor.new_zeros(tensor.shape)
        if factor != 1.0 and isinstance(origin, Neurons) and origin.part == "down" and origin.expert != "shared":
            return tensor.float() * factor
        return tensor

    config = plan.config | ({plan.target.top_k_key: plan.layout.num_experts} if everyone else {})
    return StreamedModel(
        config, converted.tensors, read, lambda layer: plan.target.one_layer(dense=layer in plan.layout.dense_layers)
    )


def _difference(parent: torch.Tensor, converted: torch.Tensor) -> float:
    """Max abs difference over max abs value; infinite if anything is not finite."""
    value = float((parent - converted).abs().max() / parent.abs().max())
    return value if value == value else float("inf")


def _layer_error(target: Target, module: torch.nn.Module, taps: _Taps, layer: int) -> float:
    x, want = taps.inputs[layer], taps.outputs[layer]
    have = 0
    for name in target.ffn_modules:
        block = getattr(module, name, None)
        if block is not None:
            output = block(x)
            have = have + (output[0] if isinstance(output, tuple) else output)
    return _difference(want, have.reshape(want.shape))  # type: ignore[attr-defined]


def _largest_router_logit(plan: SplitPlan, converted: Checkpoint, taps: _Taps) -> float:
    rows = {t.layer: t.name for t in plan.tensors if isinstance(t.origin, Router)}
    found = 0.0
    for layer, name in rows.items():
        x = taps.inputs[layer or 0]
        found = max(found, float((x.reshape(-1, x.shape[-1]) @ converted.read(name).float().T).abs().max()))
    return found
