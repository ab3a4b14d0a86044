"""Calibration of one run of ``llamamoe split``: its text, its walk, and the state for a resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..alignment.cost import held_out_sequences
from ..alignment.layers import AlignedLayer
from ..calibration.compute import Compute
from ..calibration.gradients import GradientStore
from ..calibration.states import KeptStates
from ..calibration.text import CalibrationText, calibration_text
from ..calibration.walk import Walk, cast_ffn, read_ffn
from ..checkpoint.files import make_folder, replacing, write_text
from ..checkpoint.ledger import STATES
from ..checkpoint.tensors import torch_dtype
from ..checkpoint.tokenizer_loading import needed_tokenizer
from ..checkpoint.writer import CheckpointWriter
from ..errors import RefusedError
from ..lazy import np, torch
from ..methods.attention import HeadInputs, RoutedHeads
from ..methods.layer import LayerInputs
from ..methods.moe_layer import ConvertedFfn, dense_outputs
from ..progress import ProgressCallback
from .aligning import aligned_layers
from .attention import ConvertedAttention, convert_attention, heads_as_stored
from .layer import layer_context
from .plan import SplitPlan
from .recipe import AUTO

UNIT = "calibration"
"""The ledger's unit for the facts of the text."""
_ALIGNMENT_TEXT = "alignment text"
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


class Session:
    """The text and the walk of a run, kept on disk so that a stopped run resumes with byte-identical results.

    After every layer the residual stream is in a file with its hash beside it. If that is missing or damaged,
    the walk starts again at the first layer, with the same results.

    Args:
        plan: The plan, whose ``calibration`` is set.
        compute: Device and dtype.
        writer: The writer, whose ledger stores the facts of the text and whose folder stores the states.
        progress: Called while text is sampled or gradients are computed.
        texts: The texts, if they have already been read (see `read_ahead`).
    """

    def __init__(
        self,
        plan: SplitPlan,
        compute: Compute,
        writer: CheckpointWriter,
        progress: ProgressCallback,
        texts: Texts | None = None,
    ) -> None:
        self.plan, self.compute, self._given = plan, compute, texts
        self._writer, self._progress = writer, progress
        self.folder = writer.path / STATES
        self._states = KeptStates(self.folder)
        self.given: dict[int, AlignedLayer] = {}
        self._text: CalibrationText | None = None
        self._walk: Walk | None = None

    @property
    def walk(self) -> Walk:
        """The walk; available after `begin`."""
        assert self._walk is not None, "begin first"
        return self._walk

    def begin(self, layer: int) -> int:
        """Prepare to convert ``layer``, the first unfinished one; return the layer to start at: ``layer`` or 0."""
        assert self.plan.calibration is not None
        given = self._given.calibration if self._given else None
        text = self._text = self._kept_text(UNIT, self.folder, lambda: self._clustered(given))
        if self.plan.recipe.align is not None:
            self.given = self._aligned(text)
        gradients = self._gradients(text) if self.plan.calibration.gradients else None
        self._walk = Walk(
            self.plan.model,
            text,
            self.compute,
            weights_dtype=torch_dtype(self.plan.dtype),
            folder=self.folder,
            map_inputs=self.plan.calibration.input_place != "memory",
            gradients=gradients,
        )
        if layer > 0 and self._states.holds(layer, self.walk.buffers[layer % 2]):
            return layer
        self._walk.start()
        return 0

    def enter(self, layer: int) -> tuple[LayerInputs, ConvertedAttention | None]:
        """Return the inputs of the layer's FFN, and its attention if that is converted; see `Walk.enter`."""
        if not self.plan.target.attention_experts:
            return self.walk.enter(layer), None
        converted: list[ConvertedAttention] = []

        def convert(text: HeadInputs) -> RoutedHeads:
            converted.append(convert_attention(self.plan, layer, layer_context(self.plan, layer), text))
            return heads_as_stored(self.plan, converted[0].heads)

        return self.walk.enter(layer, convert), converted[0]

    def leave(self, layer: int, inputs: LayerInputs, moe: ConvertedFfn | None) -> None:
        """Continue to the next layer with the outputs of the converted layer (None: it stays dense), and save that."""
        if layer + 1 == self.plan.model.spec.num_layers:
            return
        if moe is None:
            outputs = dense_outputs(inputs, cast_ffn(read_ffn(self.plan.model, layer), torch_dtype(self.plan.dtype)))
        else:
            outputs = moe.outputs(inputs)
        self.walk.leave(layer, outputs)
        self._states.save(layer + 1, self.walk.buffers[(layer + 1) % 2])

    def _aligned(self, text: CalibrationText) -> dict[int, AlignedLayer]:
        folder, given = self.folder / "alignment", self._given.alignment if self._given else None

        def more() -> CalibrationText:
            return given or alignment_text(self.plan, self.compute, self._progress)

        kept = partial(self._kept_text, _ALIGNMENT_TEXT, folder, more)
        return aligned_layers(self.plan, text, kept, self.compute, self._writer, folder, self._progress)

    def _clustered(self, text: CalibrationText | None) -> CalibrationText:
        return with_clusters(self.plan, text or make_text(self.plan, self.compute, self._progress))

    # ---- states -----------------------------------------------------------------------------------------------

    def _gradients(self, text: CalibrationText) -> GradientStore:
        from ..calibration.gradients import ffn_gradients

        return ffn_gradients(
            self.plan.model,
            torch.from_numpy(text.ids_ST),
            folder=self.folder / "gradients",
            device=self.compute.device,
            compute_dtype=None if self.compute.dtype == torch.float32 else self.compute.dtype,
            progress=self._progress,
        )

    # ---- text -------------------------------------------------------------------------------------------------

    def _kept_text(self, unit: str, folder: Path, make: Callable[[], CalibrationText]) -> CalibrationText:
        """Return the text of the stopped run, or a new one, which is then stored in ledger and folder.

        Args:
            unit: The ledger's unit for the facts of the text.
            folder: Folder of the text.
            make: Reads the text.

        Raises:
            RefusedError: The text had to be read again and has changed.
        """
        make_folder(folder)
        known = self._writer.info(unit)["calibration"] if self._writer.done(unit) else None
        text = _load_text(folder)
        if text is None or (known is not None and text.facts != known):
            text = make()
            if known is not None and json.loads(json.dumps(text.facts)) != known:
                raise RefusedError(
                    f"the {unit.removesuffix(' text')} text differs from the one that the stopped run began with.",
                    hint="Restore the text, or start again with --force.",
                )
            _save_text(folder, text)
        if known is None:
            info = {
                "calibration": text.facts,
                "computed": self.compute.to_json(),
                "warnings": list(text.warnings),
            }
            self._writer.finish(unit, [], info)
            self._writer.flush()
        return text


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


def _save_text(folder: Path, text: CalibrationText) -> None:
    with replacing(folder / _IDS) as file:
        np.save(file, text.ids_ST)
    data = {
        "facts": text.facts,
        "domains": text.domains_S,
        "clusters": None if text.clusters_S is None else text.clusters_S.tolist(),
        "warnings": text.warnings,
    }
    write_text(folder / _TEXT, json.dumps(data) + "\n")


def _load_text(folder: Path) -> CalibrationText | None:
    """Return the text that `_save_text` wrote, or None if it is missing or incomplete."""
    try:
        data = json.loads((folder / _TEXT).read_text(encoding="utf-8"))
        ids = np.load(folder / _IDS, allow_pickle=False)
        clusters = None if data["clusters"] is None else np.array(data["clusters"], dtype=np.int64)
        text = CalibrationText(ids, tuple(data["domains"]), clusters, data["facts"], tuple(data["warnings"]))
        digest = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()
        return text if digest == data["facts"]["sha256_of_ids"] else None
    except (OSError, ValueError, LookupError, TypeError, EOFError, RecursionError):
        return None
