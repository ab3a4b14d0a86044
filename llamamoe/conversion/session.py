"""Calibration of one run of ``llamamoe split``: its walk, and the state for a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..alignment.layers import AlignedLayer
from ..calibration.compute import Compute
from ..calibration.gradients import GradientStore
from ..calibration.states import KeptStates
from ..calibration.text import CalibrationText
from ..calibration.walk import Walk, cast_ffn, read_ffn
from ..checkpoint.files import make_folder
from ..checkpoint.ledger import STATES
from ..checkpoint.tensors import torch_dtype
from ..checkpoint.writer import CheckpointWriter
from ..errors import RefusedError
from ..lazy import torch
from ..methods.attention import HeadInputs, RoutedHeads
from ..methods.layer import LayerInputs
from ..methods.moe_layer import ConvertedFfn, dense_outputs
from ..progress import ProgressCallback
from .aligning import aligned_layers
from .attention import ConvertedAttention, convert_attention, heads_as_stored
from .layer import layer_context
from .plan import SplitPlan
from .texts import Texts, alignment_text, load_text, make_text, save_text, with_clusters

UNIT = "calibration"
"""The ledger's unit for the facts of the text."""
_ALIGNMENT_TEXT = "alignment text"


class Session:
    """The text and the walk of a run, kept on disk so that a stopped run resumes with byte-identical results.

    After every layer the residual stream is in a file with its hash beside it. If that is missing or damaged,
    the walk starts again at the first layer, with the same results.

    Args:
        plan: The plan, whose ``calibration`` is set.
        compute: Device and dtype.
        writer: The writer, whose ledger stores the facts of the text and whose folder stores the states.
        progress: Called while text is sampled or gradients are computed.
        texts: The texts, if they have already been read (see `texts.read_ahead`).
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

    def expected_seconds(self, layer: int) -> float:
        """Return an estimate of the time from ``layer`` to the last one, from the rate of this machine's products."""
        needed, layers = self.plan.calibration, self.plan.model.spec.num_layers
        assert needed is not None
        return needed.seconds(self.compute.expected_rate()) * (layers - layer) / layers

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
        text = load_text(folder)
        if text is None or (known is not None and text.facts != known):
            text = make()
            if known is not None and json.loads(json.dumps(text.facts)) != known:
                raise RefusedError(
                    f"the {unit.removesuffix(' text')} text differs from the one that the stopped run began with.",
                    hint="Restore the text, or start again with --force.",
                )
            save_text(folder, text)
        if known is None:
            info = {
                "calibration": text.facts,
                "computed": self.compute.to_json(),
                "warnings": list(text.warnings),
            }
            self._writer.finish(unit, [], info)
            self._writer.flush()
        return text
