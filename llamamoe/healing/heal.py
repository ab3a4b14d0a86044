"""``llamamoe.heal``: distil each layer of a converted checkpoint from its dense parent's, into a new checkpoint.

The dense parent runs over the text once; inputs and outputs of each of its FFNs are the data on which the converted
FFN of the same layer is trained. So layers are independent: several processes share them, and a stopped run continues
with those that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..calibration.compute import Compute
from ..checkpoint.files import write_text
from ..checkpoint.layout import as_stored
from ..checkpoint.ledger import fingerprint_of, run_facts
from ..checkpoint.out_folder import HEAL_RECEIPT_FILE, normal_path, recover_replaced, system_errors
from ..checkpoint.tokenizer import carried_files
from ..checkpoint.writer import CheckpointWriter
from ..errors import UsageError
from ..lazy import torch
from ..models.loadable import check_model
from ..progress import ProgressCallback, ignore_progress
from .output import check_place, make_receipt, write_side_files
from .plan import HealPlan, plan_heal
from .ranks import Ranks
from .recipe import HealRecipe

if TYPE_CHECKING:
    from ..calibration.text import CalibrationText


@dataclass(frozen=True)
class HealResult:
    """The result of healing.

    Attributes:
        out: The output folder.
        plan: The executed plan.
        receipt: The content of ``llamamoe_heal.json``.
        warnings: Warnings of the plan, the text, and those found while reading weights.
    """

    out: Path
    plan: HealPlan
    receipt: dict[str, Any]
    warnings: tuple[str, ...] = ()


def heal(
    model: str | Path,
    out: str | Path,
    recipe: HealRecipe,
    *,
    parent: str | Path,
    resume: bool = False,
    force: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> HealResult:
    """Distil every converted FFN and its router from the parent's on text, layer by layer, before any other training.

    Memory holds one decoder layer, its optimiser's states, and its inputs and outputs on the text (in mapped files if
    they are large). Under ``torchrun`` rank r heals the layers l with ``l % world == r``; the first one writes.

    Args:
        model: A converted checkpoint: a folder, or a hub id.
        out: The folder to create, a checkpoint like ``model``; it must not exist or be empty.
        recipe: Training settings and text.
        parent: The dense checkpoint that ``model`` was made from: folder, ``.gguf`` file or hub id.
        resume: Finish a stopped call with the same arguments; the result is byte-identical.
        force: Replace ``out`` if it holds a healed checkpoint, and discard the work of a stopped call.
        progress: Called after every layer.

    Returns:
        The result; each of several processes returns the same.

    Raises:
        RefusedError: Healing is refused and nothing was written; the message has reason and remedy.
        UsageError: The text or a device does not exist; nothing was written.
        LlamaMoeError: A layer's error is no longer finite, or writing failed; ``resume`` continues.
    """
    from .ranks import joined

    plan, place = plan_heal(model, parent, recipe), normal_path(out)
    with joined() as ranks:
        return _Healing(plan, place, ranks, progress).run(resume=resume, force=force)


class _Healing:
    """One run of `heal` in one process."""

    def __init__(self, plan: HealPlan, out: Path, ranks: Ranks, progress: ProgressCallback) -> None:
        from ..calibration.compute import choose_compute
        from .checks import renormalises

        recipe = plan.recipe
        if ranks.world > 1 and recipe.inputs == "model":
            raise UsageError(
                "inputs: model heals layers one after another, so several processes cannot share them.",
                hint="Use inputs=parent, or one process.",
            )
        self.plan, self.out, self.ranks, self.progress = plan, out, ranks, progress
        self.compute: Compute = choose_compute(ranks.device(recipe.device), recipe.compute_dtype, plan.dtype)
        self.renormalised = renormalises(plan)

    def run(self, *, resume: bool, force: bool) -> HealResult:
        """See `heal`."""
        from .checks import differences
        from .walk import LayerRun

        started, plan = time.monotonic(), self.plan
        check_model(plan.checkpoint.config, {name: info.shape for name, info in plan.checkpoint.tensors.items()})
        carried = carried_files(plan.checkpoint, plan.checkpoint.config)
        self.ranks.on_first(lambda: self._check(resume=resume, force=force))
        text = self._text()
        warnings = (*plan.warnings, *text.warnings, *differences(plan), *self._remarks())
        layers = LayerRun(
            plan, self.out, text, self.compute, self.ranks, renormalised=self.renormalised, progress=self.progress
        )
        receipt: dict[str, Any] = {}
        with system_errors(self.out):
            writer = self.ranks.on_first(lambda: self._writer(text, resume=resume, restart=force and not resume))
            if writer is None:
                layers.run(None)
            else:
                with writer:
                    receipt = self._receipt(layers.run(writer), text, writer, warnings)
                    write_side_files(plan, writer.path, receipt, carried)
                    receipt["run"] = run_facts(started) | writer.earlier() | {"processes": self.ranks.world}
                    write_text(writer.path / HEAL_RECEIPT_FILE, json.dumps(receipt, indent=2) + "\n")
                    for read in (plan.checkpoint, plan.dense.checkpoint):
                        read.check_unchanged()
                    writer.publish(replace=force)
        return HealResult(self.out, plan, self.ranks.share(receipt), warnings)

    def _check(self, *, resume: bool, force: bool) -> None:
        recover_replaced(self.out)
        check_place(self.out, self.plan, resume=resume, force=force, processes=self.ranks.world)

    def _text(self) -> CalibrationText:
        from ..calibration.sampled import open_tokenizer
        from ..calibration.text import calibration_text

        recipe = self.plan.recipe
        text = calibration_text(
            recipe.text,
            open_tokenizer(self.plan.dense.checkpoint),
            num_tokens=recipe.tokens,
            length=self.plan.length,
            weights=recipe.weights,
            seed=recipe.seed,
            vocab_size=self.plan.dense.spec.vocab_size,
        )
        if len(text.ids_ST) < 2:
            raise UsageError("the text is one sequence, but at least one must be held out.", hint="Give more text.")
        return text

    def _writer(self, text: CalibrationText, *, resume: bool, restart: bool) -> CheckpointWriter:
        return CheckpointWriter(
            self.out,
            as_stored(self.plan.checkpoint.tensors),
            fingerprint=self._fingerprint(text),
            resume=resume,
            restart=restart,
        )

    def _receipt(
        self, layers: list[dict[str, Any]], text: CalibrationText, writer: CheckpointWriter, warnings: tuple[str, ...]
    ) -> dict[str, Any]:
        return make_receipt(
            self.plan,
            layers=layers,
            text=text.facts,
            computed=self._computed(),
            renormalised=self.renormalised,
            weights_sha256=writer.weights_sha256(),
            warnings=warnings,
        )

    def _computed(self) -> dict[str, Any]:
        """Return kind of device and dtype, without the number of the device."""
        return self.compute.to_json() | {"device": self.compute.device.type}

    def _fingerprint(self, text: CalibrationText) -> str:
        """Return a fingerprint that changes whenever a resumed run would write other bytes."""
        return fingerprint_of(
            {
                "command": "heal",
                "version of llamamoe": __version__,
                "version of torch": torch.__version__,
                "number of threads": torch.get_num_threads(),
                "model": self.plan.checkpoint.fingerprint(),
                "parent": self.plan.dense.checkpoint.fingerprint(),
                "recipe": [self.plan.recipe.sha256()],
                "text": [text.facts["sha256_of_ids"]],
                "device or dtype": [self._computed()],
            }
        )

    def _remarks(self) -> Iterator[str]:
        if self.renormalised:
            yield (
                "routers are switched to weights that sum to one, because trained ones must not change the scale of the "
                "routed sum: a runtime that ignores norm_topk_prob (llama.cpp for qwen2_moe) computes a different function"
            )
