"""Make the tensors of a mixture whose pieces are selected one by one, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...architectures.moe_layout import CorrectionBias, Neurons, OutTensor, Router
from ...calibration.compute import Compute
from ...calibration.states import KeptStates
from ...calibration.text import CalibrationText
from ...checkpoint.files import make_folder
from ...checkpoint.tensors import torch_dtype
from ...conversion.assembly import LayerParts
from ...lazy import torch
from ...methods.layer import batch_tokens
from ...methods.moe_layer import dense_outputs
from ..finer_experts import FinerExperts
from .layer import PieceRouting, as_stored, finer_layer, mixture_ffn
from .walk import MixtureWalk


class RoutedPieces:
    """Makes the tensors of the result, whose layers must be asked for in order; holds one layer, twice.

    After a layer the residual stream is in files, so that a stopped run continues from there, with the same bytes.

    Args:
        routing: The sizes and the methods.
        finer: Makes the tensors that do not depend on the text.
        tensors: Tensors of the result by name.
        text: The calibration text.
        compute: Device and dtype.
        folder: Folder of the hidden states, which is created.
        map_inputs: Whether the FFN's inputs are in a file, too.
    """

    def __init__(
        self,
        routing: PieceRouting,
        finer: FinerExperts,
        tensors: Mapping[str, OutTensor],
        text: CalibrationText,
        compute: Compute,
        folder: Path,
        *,
        map_inputs: bool,
    ) -> None:
        self._routing, self._finer, self._tensors = routing, finer, tensors
        self._text, self._compute, self._folder, self._map = text, compute, folder, map_inputs
        self._walk: MixtureWalk | None = None
        self._states = KeptStates(folder)
        self._next = 0
        self._parts: LayerParts | None = None
        self._bias_N: torch.Tensor | None = None
        self._facts: dict[str, dict[str, Any]] = {}

    def make(self, name: str) -> torch.Tensor:
        """Return a tensor of the result."""
        tensor = self._tensors[name]
        origin, layer = tensor.origin, tensor.layer
        routed = isinstance(origin, Router | CorrectionBias) or (
            isinstance(origin, Neurons) and origin.expert != "shared"
        )
        if not routed or layer is None:
            return self._finer.make(name)
        parts = self._of_layer(layer)
        dtype = torch_dtype(self._finer.entry(tensor)[0])
        if isinstance(origin, Neurons):
            scale = self._routing.bake if origin.part == "down" else 1.0
            return parts.neurons(Neurons(origin.part, origin.expert, scale), dtype).contiguous()
        if isinstance(origin, Router):
            return parts.router_NH.to(dtype)
        return self._finer.make(name) if self._bias_N is None else self._bias_N.view(tensor.shape).to(dtype)

    def told(self, unit: str) -> dict[str, Any]:
        """Return the facts of a unit that was made."""
        return self._facts.get(unit, {})

    def _of_layer(self, layer: int) -> LayerParts:
        if self._walk is None:
            self._next = self._begin(layer)
        while self._next <= layer:
            self._parts = None
            self._convert(self._next)
            self._next += 1
        assert self._parts is not None, "layers are asked for in order"
        return self._parts

    def _begin(self, layer: int) -> int:
        """Start the walk; return the layer that it is at: the given one if its inputs are kept, else the first."""
        make_folder(self._folder)
        source = self._routing.source
        layout = self._routing.layout
        tokens = batch_tokens(layout.num_experts * layout.expert_width)
        keys = {"folder": self._folder, "map_inputs": self._map, "batch_tokens": tokens}
        walk = MixtureWalk(source, self._text, self._compute, **keys)
        self._walk = walk
        if layer > 0 and self._states.holds(layer, walk.buffers[layer % 2]):
            return layer
        walk.start()
        return 0

    def _convert(self, layer: int) -> None:
        routing, walk = self._routing, self._walk
        assert walk is not None
        inputs = walk.enter(layer)
        last = layer + 1 == routing.source.spec.num_layers
        if layer in routing.source.layout.dense_layers:
            if not last:
                walk.leave_unchanged(layer, inputs)
        else:
            parent = mixture_ffn(routing.source, layer)
            moe, self._facts[f"layer.{layer}"] = finer_layer(routing, layer, parent, inputs)
            self._bias_N = moe.bias_N
            self._parts = LayerParts(parent, moe.partition, moe.router_NH, routing.layout, moe.weights)
            if not last:
                after = as_stored(routing, moe).outputs(inputs)
                walk.leave_changed(layer, inputs, dense_outputs(inputs, parent), after)
        if not last:
            self._states.save(layer + 1, walk.buffers[(layer + 1) % 2])
