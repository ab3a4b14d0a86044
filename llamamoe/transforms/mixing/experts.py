"""Make the tensors of a mix: each expert from the FFN of its model, with one FFN in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...architectures.moe_layout import Neurons, OutTensor
from ...calibration.walk import StoredFfn
from ...checkpoint.tensors import nonfinite, one_thread
from ...conversion.assembly import LayerParts, make
from ...conversion.layer import layer_context
from ...errors import RefusedError
from ...lazy import np, torch
from ...methods.routers import ROUTERS
from ...methods.splitters.upcycle import Upcycle
from ...recipes import plugin
from .plan import MixPlan


class _HeldFfn(StoredFfn):
    """An FFN of which each matrix is read once: the next FFN replaces it."""

    def release(self) -> None:
        """Keep the matrices, of which only one part is needed at a time."""


@dataclass
class MixedParts(LayerParts):
    """The pieces of one layer whose experts come from several models.

    Attributes:
        of_expert: Returns the pieces of the model that an expert comes from.
    """

    of_expert: Callable[[int], LayerParts] | None = None

    def neurons(self, origin: Neurons, dtype: torch.dtype) -> torch.Tensor:
        """See `LayerParts.neurons`."""
        assert self.of_expert is not None
        if isinstance(origin.expert, int):
            return self.of_expert(origin.expert).neurons(origin, dtype)
        return super().neurons(origin, dtype)


class MixTensors:
    """The tensors of a mix by name; one FFN of one model is in memory.

    Args:
        plan: The plan.
        rows: The router's rows of each layer; empty if they are random.
    """

    def __init__(self, plan: MixPlan, rows: Mapping[int, torch.Tensor]) -> None:
        self.plan, self._given = plan, rows
        self._tensors: dict[str, OutTensor] = {tensor.name: tensor for tensor in plan.layout.tensors}
        self._layer: tuple[int, MixedParts] | None = None
        self._held: tuple[tuple[int, int], LayerParts] | None = None

    def make(self, name: str) -> torch.Tensor:
        """Return one tensor of the output, contiguous.

        Raises:
            RefusedError: It has values that the dtype cannot hold.
        """
        tensor, layout = self._tensors[name], self.plan.layout
        parts = None if tensor.layer is None else self._parts(tensor.layer)
        with one_thread():
            value = make(tensor, self.plan.layout.model, parts, layout.dtype)
        if layout.dtype == "F16" and nonfinite(value):
            raise RefusedError(
                f"{name} has values that float16 cannot hold: they would become infinite.",
                hint="Repeat with --dtype bfloat16 or float32, and --force.",
            )
        return value

    def _parts(self, layer: int) -> MixedParts:
        if self._layer is None or self._layer[0] != layer:
            first = self._of_model(layer, 0)
            parts = MixedParts(first.ffn, first.partition, self._rows(layer, first), self.plan.layout.layout)
            parts.of_expert = lambda expert: self._of_model(layer, expert)
            self._layer = layer, parts
        return self._layer[1]

    def _of_model(self, layer: int, index: int) -> LayerParts:
        """Return the FFN of a model as the expert of this index, whichever it is."""
        key = layer, index
        if self._held is None or self._held[0] != key:
            self._held = None  # release one FFN before the next is read
            ffn = _HeldFfn(self.plan.experts[index], layer)
            context = layer_context(self.plan.layout, layer)
            partition = Upcycle(Upcycle.Options()).split(ffn, np.empty(0, np.int64), context)
            self._held = key, LayerParts(ffn, partition, torch.empty(0), self.plan.layout.layout)
        return self._held[1]

    def _rows(self, layer: int, parts: LayerParts) -> torch.Tensor:
        """Return the router's rows, float32 ``[N, H]``."""
        if layer in self._given:
            return self._given[layer]
        router = plugin(ROUTERS, self.plan.layout.recipe.router)
        rows: torch.Tensor = router.rows(parts.ffn, parts.partition, layer_context(self.plan.layout, layer))
        return rows
