"""``llamamoe.verify``: check that a converted checkpoint computes the same as its parent.

The parent is opened by transformers' own ``from_pretrained`` (`llamamoe.conversion.reference`), and both are run by
transformers' classes with one layer in memory (`llamamoe.conversion.verify_runs`), in float32, with every expert
selected. The converted one runs twice: with its router rows set to zero (all weights equal: the claim of exactness),
and with the router as it is stored (the effect of a hard router).

A conversion that claims nothing (repaired, pruned, partly re-initialised) also runs, and must give finite logits; their
distance from the parent's is reported. The parent's neurons that it keeps are checked bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..architectures.dense_checkpoint import refuse_foreign, understand
from ..checkpoint.base import Checkpoint
from ..checkpoint.locate import check_folder, locate, parent_vocabulary
from ..checkpoint.out_folder import RECIPE_FILE
from ..checkpoint.paths import inside
from ..checkpoint.reader import SafetensorsCheckpoint
from ..checkpoint.text_part import open_text
from ..errors import RefusedError, VerificationError
from ..methods.router_scale import HARD_LOGIT
from ..progress import Progress, ProgressCallback, ignore_progress
from .derived import refuse_derived
from .plan import SplitPlan
from .verify_files import Hashes, WeightsChecked, check_files, check_neurons, check_weights
from .verify_runs import Measured, compare_logits

EQUAL_TOLERANCE = 1e-5
HARD_TOLERANCE = 2 * HARD_LOGIT
ROUNDED_TOLERANCE = 2e-2
HALF_TOLERANCE = 5e-2
PARAMETERS_PER_SECOND = 1.5e7
"""Parameters of both models that are verified in a second, for the estimate of ``--dry-run``: two cores on which other
programs run, too; idle ones verify about twice as many."""


@dataclass(frozen=True)
class Verification:
    """Differences between a conversion and its parent, all experts selected.

    Attributes:
        equal_weights: max abs logit difference / max abs logit, router rows zero; None if the conversion makes
            no claim of exactness.
        equal_tolerance: Limit of `equal_weights`.
        as_stored: The same with the router as stored; None for a soft router. Where experts are copies, with the
            configured top-k, for which they are exact too.
        stored_tolerance: Limit of `as_stored`.
        largest_logit: Largest absolute router logit on the text, router as stored.
        layer_error: Per MoE layer, max abs difference of the FFN outputs on the parent's own FFN inputs over the
            largest abs output; the last number of the pair (layer, error). All experts at equal weights; the
            configured top-k and the router as stored if no exactness is claimed.
        parity_factor: Factor of routed outputs in the comparison.
        reference: Description of how the parent was opened and run.
        num_tokens: Tokens of the text.
        tokens: Origin of the text: ``"text"`` or ``"random ids"`` (no tokenizer).
        neurons_checked: Number of layers whose neurons equal the parent's bit for bit (see `kept`).
        passed: Whether all checks passed.
        note: Reason why nothing could be compared; empty otherwise.
        kept: The part of neurons that was compared: ``"neurons"``, ``"gate_up"`` (repair changed the down projections),
            ``"nothing"``.
        all_experts: As `equal_weights`, for a conversion that does not claim exactness: for information only.
        as_configured: The same with the configured top-k and the router as stored; it must only be finite.
        copied_checked: Number of tensors outside the experts that equal the parent's bit for bit.
        hashed_checked: Number of tensors, experts and routers included, whose SHA-256 matches the receipt.
        unproven: Reason why hashes could not be compared; empty otherwise.
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
        """Return the outcome as JSON-compatible data."""
        return asdict(self) | {"layer_error": [list(pair) for pair in self.layer_error]}


def verify(out: str | Path, against: str | Path, *, progress: ProgressCallback = ignore_progress) -> Verification:
    """Check a converted checkpoint against the dense one that it was made from.

    Names, shapes, dtypes and configuration must match the recipe in ``out``; weights copied from the parent
    must equal the parent's, and every neuron must occur exactly once, bit for bit; all weights must have the SHA-256 in
    the receipt, and be finite; the logits must agree with those of the parent as plain transformers loads it. A
    missing receipt is noted in the result. A conversion that claims less is only checked for its claims (see
    `llamamoe.conversion.verify_files.check_neurons`) and for finite logits.

    Args:
        out: A folder that `llamamoe.split` wrote.
        against: Its parent: folder, ``.gguf`` file or hub id.
        progress: Called after every layer.

    Raises:
        RefusedError: One of the two cannot be read, or ``out`` has no recipe.
        VerificationError: A check failed; the message names the difference.
    """
    from .plan import plan_split
    from .recipe import load_recipe

    folder = Path(out).expanduser()
    check_folder(folder)
    _refuse_others(folder)
    location = locate(against)
    model = understand(open_text(location, tokenizer=parent_vocabulary(location.path, folder)))
    plan = plan_split(model, load_recipe(inside(folder, RECIPE_FILE)))
    _check_tokenizer(plan, folder)
    result = verify_conversion(plan, folder, Hashes.of_receipt(folder), progress)
    if not result.passed:
        raise VerificationError(f"{folder} cannot be verified: {result.note}.")
    return result


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that `split` did not write, naming the command that wrote it."""
    refuse_derived(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise RefusedError(
            f"{folder} holds no {RECIPE_FILE}, so it was not written by `llamamoe split`.",
            hint="Give the folder that `llamamoe split` made.",
        )


def _check_tokenizer(plan: SplitPlan, folder: Path) -> None:
    from ..checkpoint.tokenizer_difference import check_same
    from ..checkpoint.tokenizer_loading import parent_tokenizer
    from ..models.loadable import check_counts

    parent = parent_tokenizer(plan.model.checkpoint)
    if parent is not None:
        converted = SafetensorsCheckpoint(folder)
        check_counts(converted.config, converted.tensors)
        own = parent_tokenizer(converted)
        if own is None:
            raise VerificationError(f"{folder} has no tokenizer, but its parent has one.", hint="Convert it again.")
        check_same(parent, own, str(folder))


def verify_conversion(
    plan: SplitPlan, folder: Path, hashes: Hashes, progress: ProgressCallback = ignore_progress
) -> Verification:
    """Verify like `verify`, given plan and hashes, a folder that need not be published yet."""
    converted = SafetensorsCheckpoint(folder)
    with _changes_told(plan.model.checkpoint, converted):
        return _verified(plan, converted, hashes, progress)


@contextmanager
def _changes_told(*read: Checkpoint) -> Iterator[None]:
    """Report files that changed meanwhile as such, whatever error they caused, since transformers reads them too."""
    try:
        yield
    except Exception:
        for each in read:
            each.check_unchanged()
        raise
    for each in read:
        each.check_unchanged()


def verification_seconds(plan: SplitPlan) -> float:
    """Return an estimate of the time: every weight of both models is read, compared and run a few times."""
    return (plan.parent_cost.total_parameters + plan.cost.total_parameters) / PARAMETERS_PER_SECOND


def _verified(
    plan: SplitPlan, converted: SafetensorsCheckpoint, hashes: Hashes, progress: ProgressCallback
) -> Verification:
    refuse_foreign(converted)  # transformers would quantise the weights, or run other code
    check_files(plan, converted)
    neurons = check_all_neurons(plan, converted, progress)
    # before the logits, which cannot locate a changed tensor
    weights = check_weights(plan, converted, hashes, progress)
    return compared(plan, converted, neurons, weights, progress)


def check_all_neurons(plan: SplitPlan, converted: Checkpoint, progress: ProgressCallback) -> int:
    """Check the neurons of every MoE layer (see `check_neurons`) and return the number of these layers.

    Raises:
        VerificationError: A neuron is missing, repeated or changed.
    """
    if plan.kept == "nothing":
        return 0
    layers = [i for i in range(plan.model.spec.num_layers) if i not in plan.layout.dense_layers]
    for done, layer in enumerate(layers, start=1):
        check_neurons(plan, converted, layer)
        progress(Progress("check neurons", done, len(layers), "layer"))
    return len(layers)


def compared(
    plan: SplitPlan, converted: SafetensorsCheckpoint, neurons: int, weights: WeightsChecked, progress: ProgressCallback
) -> Verification:
    """Compare the logits with the parent's (see `verify`) and return the outcome of all checks.

    Args:
        plan: The plan of the conversion.
        converted: The conversion.
        neurons: Number of layers whose neurons were compared.
        weights: The outcome of comparing the weights.
        progress: Called after every layer.

    Raises:
        VerificationError: A difference is larger than the claims of the plan allow.
    """
    measured = compare_logits(plan, converted, progress)
    _check_claims(plan, measured)
    return _result(plan, measured, neurons, weights)


def _tolerances(plan: SplitPlan) -> tuple[float, float]:
    """Return the limits of differences at equal weights and as stored."""
    exact = plan.dtype == "F32" or plan.layout.combine.bake_is_exact
    equal = EQUAL_TOLERANCE if exact else ROUNDED_TOLERANCE
    return equal, max(equal, HALF_TOLERANCE if plan.dtype == "F16" else HARD_TOLERANCE)


def _check_claims(plan: SplitPlan, measured: Measured) -> None:
    equal_tolerance, stored_tolerance = _tolerances(plan)
    equal, stored = measured.equal, measured.stored
    if plan.parity == "exact" and ((equal or 0.0) > equal_tolerance or (stored or 0.0) > stored_tolerance):
        _raise_inexact(measured, equal_tolerance, stored_tolerance)
    if stored == math.inf:
        raise VerificationError(
            "the logits are not finite with the configured top-k, although the parent's are.",
            hint="Weights that changed since the conversion cause this; otherwise please report it.",
        )


def _result(plan: SplitPlan, measured: Measured, neurons: int, weights: WeightsChecked) -> Verification:
    equal_tolerance, stored_tolerance = _tolerances(plan)
    claims = plan.parity == "exact"
    equal, stored = measured.equal, measured.stored
    compared = equal is not None or stored is not None
    return Verification(
        equal_weights=equal if claims else None,
        equal_tolerance=equal_tolerance,
        as_stored=stored if claims else None,
        stored_tolerance=stored_tolerance,
        largest_logit=measured.largest,
        layer_error=tuple(measured.errors),
        parity_factor=plan.layout.combine.parity_factor,
        reference=measured.reference,
        num_tokens=measured.tokens,
        tokens=measured.origin,
        neurons_checked=neurons,
        passed=compared,
        note="" if compared else "the parent's own logits are not finite, so there is nothing to compare with",
        kept=plan.kept,
        all_experts=None if claims or equal == math.inf else equal,
        as_configured=None if claims else stored,
        copied_checked=weights.copied,
        hashed_checked=weights.hashed,
        unproven=weights.unproven,
    )


def _raise_inexact(measured: Measured, equal_tolerance: float, stored_tolerance: float) -> NoReturn:
    worst = max(measured.errors, key=lambda pair: pair[1], default=(0, 0.0))
    stored = measured.stored
    raise VerificationError(
        f"with all experts selected the logits differ from the parent's by {measured.equal:.2e} of the largest one at "
        f"equal weights (allowed {equal_tolerance:.0e})"
        + (f" and by {stored:.2e} as stored (allowed {stored_tolerance:.0e})" if stored is not None else "")
        + f"; the worst layer is {worst[0]} with {worst[1]:.2e}.",
        hint="Weights that changed since the conversion cause this; otherwise please report it.",
    )
