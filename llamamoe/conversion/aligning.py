"""Run alignment in ``llamamoe split``: partitions and routers learned before the layers are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..alignment.layers import AlignedLayer, Start
from ..alignment.states import STATE, load_layers, remove_file, save_layers
from ..calibration.compute import Compute
from ..calibration.text import CalibrationText
from ..calibration.walk import Walk, read_ffn, remove_buffers
from ..checkpoint.files import make_folder, remove_temporaries
from ..checkpoint.tensors import torch_dtype
from ..checkpoint.writer import CheckpointWriter
from ..methods.moe_layer import dense_outputs
from ..progress import Progress, ProgressCallback
from .layer import convert_layer, first_partition, layer_context, selected_coefficient
from .plan import SplitPlan

if TYPE_CHECKING:
    from ..alignment.align import Aligned

UNIT = "alignment"
"""The ledger's unit for the result."""
_STARTS, _RESULT = "starts.safetensors", "aligned.safetensors"


def aligned_layers(
    plan: SplitPlan,
    calibration: CalibrationText,
    make_text: Callable[[], CalibrationText],
    compute: Compute,
    writer: CheckpointWriter,
    folder: Path,
    progress: ProgressCallback,
) -> dict[int, AlignedLayer]:
    """Return partition and router rows of each converted layer, learned now or by a stopped run.

    Args:
        plan: The plan, whose recipe requests alignment.
        calibration: The text for the methods that make the start.
        make_text: Returns the text for learning; called only if there is something to learn.
        compute: Device and dtype.
        writer: The writer, whose ledger stores the facts.
        folder: Folder of the states.
        progress: Called after every layer and step.

    Raises:
        LlamaMoeError: There is too little text, or a value is not finite.
    """
    if writer.done(UNIT):
        kept = load_layers(folder / _RESULT, writer.info(UNIT)["sha256"])
        if kept is not None:
            return kept
    text = make_text()
    found = learn(plan, calibration, text, compute, folder, progress)
    digest = save_layers(folder / _RESULT, found.layers)
    if not writer.done(UNIT):
        facts: dict[str, Any] = {"alignment": found.facts | {"text": text.facts}, "sha256": digest}
        writer.finish(UNIT, [], facts | {"warnings": list(text.warnings)})
        writer.flush()
    return found.layers


def learn(
    plan: SplitPlan,
    calibration: CalibrationText,
    text: CalibrationText,
    compute: Compute,
    folder: Path,
    progress: ProgressCallback,
) -> Aligned:
    """Convert the layers by the recipe's methods, and align them.

    Args:
        plan: The plan, whose recipe requests alignment.
        calibration: The text for the methods that make the start.
        text: The text for learning.
        compute: Device and dtype.
        folder: Folder of the states from which a stopped run of the same plan and texts resumes.
        progress: Called after every layer and step.

    Raises:
        LlamaMoeError: There is too little text, or a value is not finite.
    """
    from ..alignment.align import Alignment

    assert plan.recipe.align is not None, "the recipe requests it"
    make_folder(folder)
    return Alignment(
        plan.model,
        _starts(plan, calibration, compute, folder, progress),
        text.ids_ST,
        plan.recipe.align,
        compute,
        weights_dtype=torch_dtype(plan.dtype),
        folder=folder,
        progress=progress,
    ).run()


def remove_work(folder: Path) -> None:
    """Delete the states that `learn` keeps in a folder."""
    for name in (_STARTS, STATE):
        remove_file(folder / name)
    remove_buffers(folder)
    remove_temporaries(folder)


def _starts(
    plan: SplitPlan, text: CalibrationText, compute: Compute, folder: Path, progress: ProgressCallback
) -> dict[int, Start]:
    """Convert each layer by the recipe's methods, with its repair only if FFN weights are learned too."""
    layers = [layer for layer in range(plan.model.spec.num_layers) if layer not in plan.layout.dense_layers]
    starts = load_layers(folder / _STARTS)
    if starts is None:
        starts = _first_layers(plan, text, compute, folder, progress)
        save_layers(folder / _STARTS, starts)
        remove_buffers(folder)
    coefficient = selected_coefficient(plan)
    return {layer: Start(starts[layer], layer_context(plan, layer), coefficient) for layer in layers}


def _first_layers(
    plan: SplitPlan, text: CalibrationText, compute: Compute, folder: Path, progress: ProgressCallback
) -> dict[int, AlignedLayer]:
    assert plan.calibration is not None
    walk = Walk(
        plan.model,
        text,
        compute,
        weights_dtype=torch_dtype(plan.dtype),
        folder=folder,
        map_inputs=plan.calibration.input_place != "memory",
    )
    walk.start()
    found: dict[int, AlignedLayer] = {}
    layers = plan.model.spec.num_layers
    for layer in range(layers):
        inputs, ffn = walk.enter(layer), read_ffn(plan.model, layer)
        outputs = dense_outputs(inputs, ffn)
        if layer not in plan.layout.dense_layers:
            if plan.aligns_weights:
                converted = convert_layer(plan, layer, inputs)
                assert converted.moe is not None
                part = replace(converted.moe.partition, router_NH=converted.moe.router_NH.cpu())
                found[layer] = AlignedLayer.of(ffn, part, converted.moe.weights)
                outputs = converted.moe.outputs(inputs)
            else:
                found[layer] = AlignedLayer(first_partition(plan, layer, inputs))
        if layer + 1 < layers:
            walk.leave(layer, outputs)
        progress(Progress("first layers", layer + 1, layers, "layer"))
    return found
