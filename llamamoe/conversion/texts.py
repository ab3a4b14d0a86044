"""The texts of a conversion: read from files or sampled from the source, clustered, and kept for a resume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..alignment.cost import held_out_sequences
from ..calibration.compute import Compute
from ..calibration.text import CalibrationText, calibration_text
from ..checkpoint.files import replacing, write_text
from ..checkpoint.tokenizer_loading import needed_tokenizer
from ..errors import RefusedError
from ..lazy import np
from ..progress import ProgressCallback
from .plan import SplitPlan
from .recipe import AUTO

_TEXT, _IDS = "text.json", "ids.npy"


@dataclass(frozen=True)
class Texts:
    """The texts that a new run reads before it writes anything.

    Attributes:
        calibration: Text for the methods.
        alignment: Text for alignment; None without it.
    """

    calibration: CalibrationText
    alignment: CalibrationText | None


def read_ahead(plan: SplitPlan, compute: Compute, progress: ProgressCallback) -> Texts | None:
    """Read the texts of a new run before anything is written; None if sampled, which takes long and is saved.

    Raises:
        RefusedError: There is a warning, and the recipe is strict.
        UsageError, LlamaMoeError: The text is not available or too short; the message gives the reason.
    """
    if plan.recipe.calibration == (AUTO,):
        return None
    calibration = make_text(plan, compute, progress)
    alignment = alignment_text(plan, compute, progress) if plan.recipe.align is not None else None
    warnings = dict.fromkeys((*calibration.warnings, *(alignment.warnings if alignment else ())))
    if plan.recipe.strict and warnings:
        raise RefusedError("--strict refuses: " + "; ".join(warnings) + ".")
    return Texts(calibration, alignment)


def make_text(
    plan: SplitPlan,
    compute: Compute,
    progress: ProgressCallback,
    *,
    num_tokens: int | None = None,
    length: int | None = None,
) -> CalibrationText:
    """Return the recipe's calibration text in the source's tokens, read from files or sampled from the source.

    Args:
        plan: The plan, whose recipe names the text and whose ``calibration`` sets the amount.
        compute: Device and dtype of sampling.
        progress: Called while text is sampled.
        num_tokens: Overrides the recipe's ``calibration_tokens``.
        length: Overrides the plan's sequence length.

    Raises:
        UsageError, LlamaMoeError: The text is not available; the message gives the reason.
        CheckpointError: The source has no working tokenizer.
    """
    recipe, sizes, spec = plan.recipe, plan.calibration, plan.model.spec
    assert sizes is not None
    num_tokens, length = num_tokens or recipe.calibration_tokens, length or sizes.length
    tokenizer = _tokenizer(plan)
    if recipe.calibration == (AUTO,):
        from ..calibration.sampled import sample_text

        return sample_text(
            plan.model,
            tokenizer,
            num_tokens=num_tokens,
            length=length,
            seed=recipe.seed,
            dtype=compute.dtype,
            device=compute.device,
            progress=progress,
        )
    return calibration_text(
        recipe.calibration,
        tokenizer,
        num_tokens=num_tokens,
        length=length,
        weights=recipe.calibration_weights,
        seed=recipe.seed,
        vocab_size=spec.vocab_size,
    )


def alignment_text(plan: SplitPlan, compute: Compute, progress: ProgressCallback) -> CalibrationText:
    """Return the text for alignment: the same files as calibration, or more text sampled from the source.

    Raises:
        UsageError, LlamaMoeError: The text is not available or too short; the message gives the reason.
    """
    options = plan.recipe.align
    assert options is not None, "the recipe requests it"
    text = make_text(plan, compute, progress, num_tokens=options.tokens, length=options.length)
    held_out_sequences(*text.ids_ST.shape)
    return text


def _tokenizer(plan: SplitPlan) -> Any:
    return needed_tokenizer(
        plan.model.checkpoint,
        "the source has no tokenizer, so calibration text cannot be read.",
        "Put the tokenizer's files beside the weights, or for a GGUF source give --tokenizer FOLDER.",
    )


def with_clusters(plan: SplitPlan, text: CalibrationText) -> CalibrationText:
    """Return the text with a cluster for each sequence, if the method needs them."""
    if not plan.splitter.needs_clusters or text.clusters_S is not None:
        return text
    from ..calibration.clusters import text_clusters

    wanted, count = plan.layout.num_experts, len(text.ids_ST)
    warnings = text.warnings
    if count < wanted:
        warnings += (
            f"{count} sequences of calibration text cannot form {wanted} clusters: {wanted - count} experts have no "
            "own text (use more --calibration-tokens, or a smaller --calibration-length)",
        )
    clusters = text_clusters(text.ids_ST, plan.model.spec.vocab_size, min(wanted, count), plan.recipe.seed)
    return replace(text, clusters_S=clusters, warnings=warnings)


def save_text(folder: Path, text: CalibrationText) -> None:
    """Write a text into a folder, in tokens."""
    with replacing(folder / _IDS) as file:
        np.save(file, text.ids_ST)
    data = {
        "facts": text.facts,
        "domains": text.domains_S,
        "clusters": None if text.clusters_S is None else text.clusters_S.tolist(),
        "warnings": text.warnings,
    }
    write_text(folder / _TEXT, json.dumps(data) + "\n")


def load_text(folder: Path) -> CalibrationText | None:
    """Return the text that `save_text` wrote, or None if it is missing or incomplete."""
    try:
        data = json.loads((folder / _TEXT).read_text(encoding="utf-8"))
        ids = np.load(folder / _IDS, allow_pickle=False)
        clusters = None if data["clusters"] is None else np.array(data["clusters"], dtype=np.int64)
        text = CalibrationText(ids, tuple(data["domains"]), clusters, data["facts"], tuple(data["warnings"]))
        digest = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()
        return text if digest == data["facts"]["sha256_of_ids"] else None
    except (OSError, ValueError, LookupError, TypeError, EOFError, RecursionError):
        return None
