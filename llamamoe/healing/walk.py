"""Run `heal` over the layers: the walk, their distribution among processes, and writing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..calibration.compute import Compute
from ..calibration.text import CalibrationText
from ..calibration.walk import Walk, read_ffn
from ..checkpoint.files import make_folder
from ..checkpoint.ledger import STATES, partial_path
from ..checkpoint.tensors import torch_dtype
from ..checkpoint.writer import CheckpointWriter
from ..lazy import safetensors
from ..methods.layer import LayerInputs
from ..progress import Progress, ProgressCallback
from .layer import HealedLayer, heal_layer, parent_outputs, stored_ffn
from .plan import HealPlan
from .ranks import Handoff, Ranks
from .train_layer import LayerTask

OUTER = "outer"
"""The ledger's unit for embedding, final norm and head."""


class LayerRun:
    """The healing of this process's layers; the first process also writes those of all.

    Args:
        plan: The plan.
        out: The folder to create.
        text: The text, the same in every process.
        compute: Device and dtype.
        ranks: The position of this process among all.
        renormalised: Whether routers are changed to weights that sum to one.
        progress: Called after every layer.
    """

    def __init__(
        self,
        plan: HealPlan,
        out: Path,
        text: CalibrationText,
        compute: Compute,
        ranks: Ranks,
        *,
        renormalised: bool,
        progress: ProgressCallback,
    ) -> None:
        self.plan, self.text, self.compute, self.ranks = plan, text, compute, ranks
        self.renormalised, self.progress = renormalised, progress
        self._states = partial_path(out) / STATES
        self._folder = self._states / f"rank.{ranks.rank}"
        self._handoff = Handoff(self._states / "layers")

    def run(self, writer: CheckpointWriter | None) -> list[dict[str, Any]]:
        """Heal this process's layers; the first process writes all of them; return the facts of each."""
        finished: list[int] = []
        if writer is not None:
            writer.tell_kept((f"layer.{layer}" for layer in self.plan.layers), "layer", self.progress)
            finished = self._write_copies(writer)
            finished += self._collect(writer, finished)
        finished = self.ranks.share(finished)
        for layer, healed in self._healed(finished, writer):
            if writer is not None:
                self._write(writer, layer, healed)
            elif not self._handoff.holds(layer):
                self._handoff.give(layer, healed.tensors, healed.facts)
        self.ranks.wait()
        if writer is None:
            return []
        self._collect(writer, self._written(writer))
        writer.flush()
        shutil.rmtree(self._states, ignore_errors=True)
        return [writer.info(f"layer.{layer}") for layer in self.plan.layers]

    def _healed(self, finished: list[int], writer: CheckpointWriter | None) -> Iterator[tuple[int, HealedLayer]]:
        """Walk through the layers up to the last one that this process must heal."""
        plan = self.plan
        mine = [layer for layer in plan.layers if self.ranks.takes(layer) and layer not in finished]
        if not mine:
            return
        walk = self._walk()
        held_out = plan.held_out_of(len(self.text.ids_ST)) * self.text.ids_ST.shape[1]
        for layer in range(mine[-1] + 1):
            inputs = walk.enter(layer)
            aims_TH = self._aims(inputs, layer)
            if layer in mine:
                task = LayerTask(inputs, aims_TH, inputs.num_tokens - held_out, plan.recipe, layer)
                yield layer, heal_layer(plan, task, renormalised=self.renormalised)
                self.progress(Progress("heal", mine.index(layer) + 1, len(mine), "layer", f"layer.{layer}"))
            if layer < mine[-1]:
                walk.leave(layer, self._onward(inputs, layer, aims_TH, writer))

    def _walk(self) -> Walk:
        place = None
        if self.plan.states_in_files:
            make_folder(self._folder)
            place = self._folder
        norm = f"model.layers.{self.plan.layers[0]}.{self.plan.dense.spec.ffn_norm}"
        stored = torch_dtype(self.plan.checkpoint.tensors[norm].dtype)
        walk = Walk(
            self.plan.dense, self.text, self.compute, weights_dtype=stored, folder=place, map_inputs=place is not None
        )
        walk.start()
        return walk

    def _aims(self, inputs: LayerInputs, layer: int) -> torch.Tensor:
        path = self._folder / "aims" if self.plan.states_in_files else None
        return parent_outputs(inputs, read_ffn(self.plan.dense, layer), self.compute.dtype, path)

    def _onward(
        self, inputs: LayerInputs, layer: int, aims_TH: torch.Tensor, writer: CheckpointWriter | None
    ) -> Iterator[torch.Tensor]:
        """Yield the outputs of the layer's FFN for the next layers: the parent's, or those of the written one."""
        if self.plan.recipe.inputs == "parent" or layer not in self.plan.layers:
            yield from (aims_TH[part].float() for part in inputs.batches())
            return
        assert writer is not None
        writer.flush()
        tensors = {}
        for name in self.plan.layer_names(layer):
            path = writer.path / writer.slots[name].file
            with safetensors.safe_open(path, framework="pt", backend="pread") as file:
                tensors[name] = file.get_tensor(name)
        ffn = stored_ffn(self.plan, layer, tensors, renormalised=self.renormalised).to(inputs.device)
        with torch.no_grad():
            yield from (ffn.outputs(x_BH).float() for x_BH in inputs.inputs())

    # ---- writing ----------------------------------------------------------------------------------------------

    def _write_copies(self, writer: CheckpointWriter) -> list[int]:
        """Write what is not healed; return the converted layers that an earlier run finished."""
        plan = self.plan
        units = {OUTER: plan.outer_names()}
        units |= {f"layer.{i}": plan.layer_names(i) for i in range(plan.num_layers) if i not in plan.layers}
        for unit, names in units.items():
            if not writer.done(unit):
                for name in names:
                    writer.make_room(name)
                    writer.put(name, plan.checkpoint.read(name).contiguous())
                writer.finish(unit, names, {})
        return self._written(writer)

    def _written(self, writer: CheckpointWriter) -> list[int]:
        writer.flush()
        return [layer for layer in self.plan.layers if writer.done(f"layer.{layer}")]

    def _collect(self, writer: CheckpointWriter, finished: list[int]) -> list[int]:
        """Write the layers that other processes finished; return their indices."""
        found = [layer for layer in self.plan.layers if layer not in finished and self._handoff.holds(layer)]
        for layer in found:
            self._write(writer, layer, HealedLayer(*self._handoff.take(layer)))
        return found

    def _write(self, writer: CheckpointWriter, layer: int, healed: HealedLayer) -> None:
        names = self.plan.layer_names(layer)
        for name in names:
            tensor = healed.tensors[name] if name in healed.tensors else self.plan.checkpoint.read(name)
            writer.put(name, tensor.contiguous())
        writer.finish(f"layer.{layer}", names, healed.facts)
        writer.flush()
