"""``llamamoe.split``: execute the plan one layer at a time, into a folder that appears whole or not at all."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..architectures.dense_checkpoint import understand
from ..calibration.compute import Compute, choose_compute
from ..checkpoint.files import write_text
from ..checkpoint.layout import index_json
from ..checkpoint.ledger import check_left, partial_path, run_facts
from ..checkpoint.locate import Location, locate, locate_headers
from ..checkpoint.out_folder import RECEIPT_FILE, RECIPE_FILE, check_out, normal_path, recover_replaced, system_errors
from ..checkpoint.reader import INDEX
from ..checkpoint.tensors import nonfinite
from ..checkpoint.text_part import open_text
from ..checkpoint.tokenizer import CarriedFiles, carried_files
from ..checkpoint.writer import CheckpointWriter
from ..errors import RefusedError
from ..lazy import check_transformers
from ..models.loadable import check_loads, check_model
from ..progress import Progress, ProgressCallback, ignore_progress
from .aligning import UNIT as ALIGNMENT
from .card import model_card
from .plan import SplitPlan
from .preflight import check_disk, planned
from .provenance import config_block, plan_fingerprint
from .recipe import SplitRecipe
from .session import UNIT, Session
from .texts import read_ahead
from .verify import verify_conversion
from .verify_files import Hashes
from .weights import write_weights


@dataclass(frozen=True)
class SplitResult:
    """The result of a conversion.

    Attributes:
        out: The output folder.
        plan: The executed plan.
        receipt: The content of ``llamamoe_receipt.json``.
        warnings: Warnings of the plan, and those found while reading weights.
    """

    out: Path
    plan: SplitPlan
    receipt: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


def plan_conversion(
    source: str | Path,
    recipe: SplitRecipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    tokenizer: str | Path | None = None,
) -> SplitPlan:
    """Return the plan of `split`, reading headers only and writing nothing.

    Of a source on the Hub no weights are downloaded.

    Args:
        source: See `split`.
        recipe: See `split`.
        out: The folder to create; None: it is not checked.
        resume: See `split`.
        force: See `split`.
        tokenizer: See `split`.

    Raises:
        RefusedError: The conversion is not possible, or `split` would refuse ``out``; the message names every reason.
        UsageError: The recipe names calibration text that does not exist.
    """
    place = None if out is None else normal_path(out)
    if place is not None:
        check_left(partial_path(place), resume=resume, restart=force)
    with locate_headers(source) as location:
        plan = _planned(source, location, recipe, tokenizer)
        if place is not None:
            check_out(place, location.path, force=force)
            check_disk(place, plan, reuse=resume or force)
        return plan


def _planned(
    source: str | Path, location: Location, recipe: SplitRecipe | None, tokenizer: str | Path | None
) -> SplitPlan:
    plan = planned(understand(open_text(location, tokenizer=tokenizer)), recipe or SplitRecipe())
    return replace(plan, repository=str(source)) if location.revision else plan


def split(
    source: str | Path,
    out: str | Path,
    recipe: SplitRecipe | None = None,
    *,
    verify: bool = True,
    resume: bool = False,
    force: bool = False,
    tokenizer: str | Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> SplitResult:
    """Convert a dense checkpoint into a mixture of experts that plain transformers loads.

    One layer is in memory at a time. ``out`` appears when everything in it is written and verified; until then
    files are written to ``OUT.partial/``, from which ``resume`` continues after a kill.

    Args:
        source: A folder, a ``.gguf`` file, ``org/name`` or ``hf://org/name@revision``.
        out: The folder to create; it must not exist, or be empty.
        recipe: The recipe; the defaults of `SplitRecipe` if None.
        verify: Compare the result with its parent before it appears (see `llamamoe.verify`).
        resume: Finish a stopped call with the same source and recipe.
        force: Replace ``out`` if it holds a checkpoint, and discard the work of a stopped call.
        tokenizer: For a GGUF source, a folder whose tokenizer files replace the vocabulary in the file.
        progress: Called after every layer.

    Raises:
        RefusedError: The conversion is refused and nothing was written; the message has reason and remedy.
        UsageError: The recipe names calibration text or a device that does not exist; nothing was written.
        VerificationError: The result does not match its parent; it stays in ``OUT.partial/``.
        LlamaMoeError: Writing failed; ``resume`` continues.
    """
    started = time.monotonic()
    check_transformers()
    out = normal_path(out)
    check_left(partial_path(out), resume=resume, restart=force)
    location = locate(source)
    plan = _planned(source, location, recipe, tokenizer)
    recover_replaced(out)
    check_out(out, location.path, force=force)
    carried = _check(plan, out, progress, reuse=resume or force)
    compute = _compute(plan)
    texts = read_ahead(plan, compute, progress) if compute and not (resume and partial_path(out).exists()) else None
    fingerprint, restart = plan_fingerprint(plan, compute.to_json() if compute else None), force and not resume
    with (
        system_errors(out),
        CheckpointWriter(out, plan.shards, fingerprint=fingerprint, resume=resume, restart=restart) as writer,
    ):
        session = Session(plan, compute, writer, progress, texts) if compute else None
        infos = write_weights(plan, writer, session, progress)
        warnings = plan.warnings + tuple(w for info in infos.values() for w in info.get("warnings", []))
        _write_side_files(plan, location, writer.path, warnings, carried)
        hashes = Hashes(writer.weights_sha256(), writer.unit_sha256())
        receipt = _receipt(plan, location, infos, hashes, warnings)
        if verify:
            receipt["verification"] = verify_conversion(plan, writer.path, hashes, progress).to_json()
        receipt["run"] = run_facts(started) | writer.earlier() | _speed(plan, compute)
        write_text(writer.path / RECEIPT_FILE, json.dumps(receipt, indent=2) + "\n")
        plan.model.checkpoint.check_unchanged()
        writer.publish(replace=force)
    return SplitResult(out, plan, receipt, warnings)


# ---- before anything is written -----------------------------------------------------------------------------------


def _check(plan: SplitPlan, out: Path, progress: ProgressCallback, *, reuse: bool) -> CarriedFiles:
    """Refuse what only files and machine reveal, and return the files to take over from the parent."""
    check_disk(out, plan, reuse=reuse)
    if plan.recipe.strict:
        _refuse_nonfinite(plan, progress)
    check_model(plan.config, {tensor.name: tensor.shape for tensor in plan.tensors})
    return carried_files(plan.model.checkpoint, plan.config)


def _refuse_nonfinite(plan: SplitPlan, progress: ProgressCallback) -> None:
    names = sorted(plan.model.checkpoint.tensors)
    for i, name in enumerate(names):
        if nonfinite(plan.model.checkpoint.read(name)):
            raise RefusedError(
                f"--strict: the tensor {name} holds NaN or infinite values.", hint="Without --strict this is a warning."
            )
        progress(Progress("check", i + 1, len(names), "tensor"))


# ---- beside the weights -------------------------------------------------------------------------------------------


def _write_side_files(
    plan: SplitPlan, location: Location, folder: Path, warnings: tuple[str, ...], carried: CarriedFiles
) -> None:
    config = plan.config | {"llamamoe": config_block(plan, location)}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copied = carried.write(folder)
    check_loads(folder)
    write_text(folder / RECIPE_FILE, plan.recipe.to_yaml())
    if len(plan.shards) > 1:
        write_text(folder / INDEX, json.dumps(index_json(plan.shards), indent=2, sort_keys=True) + "\n")
    if plan.recipe.card:
        write_text(folder / "README.md", model_card(plan, location, copied, warnings))


def _receipt(
    plan: SplitPlan,
    location: Location,
    infos: dict[str, dict[str, Any]],
    hashes: Hashes,
    warnings: tuple[str, ...],
) -> dict[str, Any]:
    calibration = infos[UNIT]["calibration"] | {"computed": infos[UNIT]["computed"]} if UNIT in infos else None
    packages = ("torch", "transformers", "safetensors", "numpy", "scikit-learn")
    return {
        "llamamoe": __version__,
        "source": {"name": location.name, "revision": location.revision, "notes": plan.model.checkpoint.notes},
        "plan": {k: v for k, v in plan.to_json().items() if k not in ("source", "llamamoe")},
        "weights_sha256": hashes.weights,
        "unit_sha256": dict(hashes.units),
        "calibration": calibration,
        "alignment": infos[ALIGNMENT]["alignment"] if ALIGNMENT in infos else None,
        "layers": [info for info in infos.values() if "layer" in info],
        "warnings": list(warnings),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def _compute(plan: SplitPlan) -> Compute | None:
    """Choose device and dtype of calibration; None without calibration."""
    if not plan.calibration:
        return None
    return choose_compute(plan.recipe.device, plan.recipe.compute_dtype, plan.source_dtype)


def _speed(plan: SplitPlan, compute: Compute | None) -> dict[str, Any]:
    """Return the rate of this machine's products, and the resulting estimate of calibration time."""
    if compute is None or plan.calibration is None:
        return {}
    rate = compute.expected_rate()
    seconds = round(plan.calibration.seconds(rate), 1)
    return {"calibration": {"flops_per_second": round(rate), "estimated_seconds": seconds}}
