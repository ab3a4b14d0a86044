"""Write the weights of a conversion one layer at a time."""

from __future__ import annotations

from typing import Any

from ..architectures.moe_layout import Neurons, OutTensor
from ..checkpoint.ledger import remove_states
from ..checkpoint.memory import reused_memory
from ..checkpoint.tensors import nonfinite, one_thread
from ..checkpoint.writer import CheckpointWriter
from ..errors import RefusedError
from ..progress import Progress, ProgressCallback
from .aligning import UNIT as ALIGNMENT
from .assembly import made_of, make
from .layer import ConvertedLayer, convert_layer
from .plan import SplitPlan
from .session import UNIT, Session
from .verify_files import OUTER, unit_of


def write_weights(
    plan: SplitPlan, writer: CheckpointWriter, session: Session | None, progress: ProgressCallback
) -> dict[str, dict[str, Any]]:
    """Write every missing unit; return the facts of each."""
    layers = plan.model.spec.num_layers
    units: dict[str, list[int]] = {OUTER: [], **{f"layer.{i}": [] for i in range(layers)}}
    for index, tensor in enumerate(plan.tensors):
        units[unit_of(tensor)].append(index)
    writer.tell_kept((unit for unit in units if unit != OUTER), "layer", progress)
    if session is not None:
        _write_calibrated(plan, writer, units, session, progress)
    else:
        with reused_memory():
            _write_uncalibrated(plan, writer, units, progress)
    writer.flush()
    remove_states(writer.path)
    first = [unit for unit in (UNIT, ALIGNMENT) if session and writer.done(unit)]
    return {unit: writer.info(unit) for unit in first + list(units)}


def _write_uncalibrated(
    plan: SplitPlan, writer: CheckpointWriter, units: dict[str, list[int]], progress: ProgressCallback
) -> None:
    for done, (unit, indices) in enumerate(units.items()):  # embedding and head, then the layers
        if not writer.done(unit):
            layer = None if unit == OUTER else int(unit.removeprefix("layer."))
            dense = layer is None or layer in plan.layout.dense_layers
            converted = None if layer is None or dense else convert_layer(plan, layer)
            _write_unit(plan, writer, unit, indices, converted)
        progress(Progress("convert", done, len(units) - 1, "layer", unit))


def _write_calibrated(
    plan: SplitPlan,
    writer: CheckpointWriter,
    units: dict[str, list[int]],
    session: Session,
    progress: ProgressCallback,
) -> None:
    """Walk through the layers with the calibration text and write the missing ones.

    A finished layer must be walked through again only if the hidden states after it are lost: converted
    again, it gives the same bytes.
    """
    if not writer.done(OUTER):
        _write_unit(plan, writer, OUTER, units[OUTER], None)
    layers = plan.model.spec.num_layers
    finished = [writer.done(f"layer.{layer}") for layer in range(layers)]
    first = finished.index(False) if False in finished else layers
    if first == layers and writer.done(UNIT):
        progress(Progress("convert", layers, layers, "layer"))
        return
    begin = session.begin(first)
    progress(Progress("convert", begin, layers, "layer", OUTER, session.expected_seconds(begin)))
    for layer in range(begin, layers):
        unit = f"layer.{layer}"
        inputs, attention = session.enter(layer)
        dense = layer in plan.layout.dense_layers
        converted = None if dense else convert_layer(plan, layer, inputs, session.given.get(layer), attention=attention)
        session.leave(layer, inputs, converted.moe if converted else None)
        if not finished[layer]:
            _write_unit(plan, writer, unit, units[unit], converted)
            writer.flush()  # the previous layer's states are overwritten only once this layer is safe
        progress(Progress("convert", layer + 1, layers, "layer", unit))


def _write_unit(
    plan: SplitPlan, writer: CheckpointWriter, unit: str, indices: list[int], converted: ConvertedLayer | None
) -> None:
    info = dict(converted.facts) if converted else {}
    parts = converted.parts if converted else None
    broken = []
    with one_thread():
        for index in sorted(indices, key=lambda i: _part_of(plan.tensors[i])):
            tensor = plan.tensors[index]
            writer.make_room(tensor.name)
            value = make(tensor, plan.model, parts, plan.dtype)
            if nonfinite(value):
                if not any(nonfinite(used) for used in made_of(tensor, plan.model, parts)):
                    raise RefusedError(
                        f"{tensor.name} has values that {plan.recipe.dtype} cannot hold (factor "
                        f"{plan.layout.combine.bake:g} included): they would become infinite.",
                        hint="Repeat with --dtype bfloat16 or float32, and --force.",
                    )
                broken.append(tensor.name)
            writer.put(tensor.name, value)
    if broken:
        info["warnings"] = [f"{len(broken)} tensors of {unit} hold NaN or infinite values, the first is {broken[0]}"]
    writer.finish(unit, [plan.tensors[i].name for i in indices], info)


def _part_of(tensor: OutTensor) -> str:
    """Return a key that is equal for tensors from the same matrix of the parent, so that it is read once."""
    return tensor.origin.part if isinstance(tensor.origin, Neurons) else ""
