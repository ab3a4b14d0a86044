"""The tensors of a mixture whose experts are partitioned: each is made from one tensor of the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from ..architectures.moe_checkpoint import ConvertedModel
from ..architectures.moe_layout import CorrectionBias, Neurons, OutTensor, softmax_scores
from ..checkpoint.base import DTYPE_BYTES
from ..conversion.sizes import PAD_TO, round_up
from ..lazy import np, torch
from ..methods.layer import PADDING, FfnWeights, LayerContext
from ..methods.splitters.base import Splitter

_Place = tuple[int, str, int | str]
"""A layer, a part of its FFN, and the expert: its index, or "all"."""


def piece_width(expert_width: int, pieces: int) -> int:
    """Return the stored width of a piece of an expert, zero neurons included: a multiple of 8, as `split` makes experts.

    transformers' default product of experts needs rows of a multiple of 16 bytes.
    """
    return round_up(-(-expert_width // pieces), PAD_TO)


def padded_pieces(experts_mW: np.ndarray, width: int) -> np.ndarray:
    """Return the pieces of an expert, int64 ``[m, W]``, with `PADDING` up to ``width``."""
    return np.pad(experts_mW, ((0, 0), (0, width - experts_mW.shape[1])), constant_values=PADDING)


class FinerExperts:
    """Makes the tensors of a mixture whose experts are split into ``pieces``; holds one expert, or one stored tensor.

    Args:
        source: The mixture.
        tensors: Tensors of the result by name.
        pieces: m; piece j of expert i is expert ``i m + j`` of the result.
        splitter: Partitions the neurons of one expert.
        seed: Its seed.
        factor: Factor of the routed down projections.
    """

    def __init__(
        self,
        source: ConvertedModel,
        tensors: Mapping[str, OutTensor],
        pieces: int,
        splitter: Splitter,
        seed: int,
        factor: float,
    ) -> None:
        self._source, self._tensors, self._pieces, self._factor = source, tensors, pieces, factor
        self._splitter, self._seed = splitter, seed
        # softmax gives each piece of an expert 1/m of its score, so what is added to it shrinks, too
        softmax = softmax_scores(source.target.router_weighting(source.mixing.weighting))
        self._bias_divisor = pieces if softmax else 1
        self._names: dict[_Place, str] = {
            place: tensor.name
            for tensor in source.target.tensors(source.spec, source.layout)
            if (place := _place(tensor)) is not None
        }
        self._read = lru_cache(maxsize=3)(source.checkpoint.read)
        self._slots_of = lru_cache(maxsize=source.layout.num_experts)(self._partition)

    def entry(self, tensor: OutTensor) -> tuple[str, tuple[int, ...], int]:
        """Return dtype, shape and bytes of a tensor of the result; the dtype is that of the tensor it is made from."""
        place = _place(tensor)
        name = tensor.name if place is None else self._names[self._origin(place)]
        dtype = self._source.checkpoint.tensors[name].dtype
        return dtype, tensor.shape, math.prod(tensor.shape) * DTYPE_BYTES[dtype]

    def make(self, name: str) -> torch.Tensor:
        """Return a tensor of the result."""
        from ..checkpoint.tensors import cast

        tensor = self._tensors[name]
        place = _place(tensor)
        if place is None:
            stored = self._repeated(self._source.checkpoint.read(name), tensor.shape)
            return stored / self._bias_divisor if isinstance(tensor.origin, CorrectionBias) else stored
        layer, part, expert = place
        stored = self._read(self._names[self._origin(place)])
        if expert == "all":
            made = self._all(stored, layer, part)
        else:
            assert isinstance(expert, int)
            slots_mW = self._slots_of(layer, expert // self._pieces)
            made = _taken(stored, slots_mW[expert % self._pieces], 1 if part == "down" else 0)
        return cast(made, made.dtype, self._factor if part == "down" else 1.0).contiguous()

    def _origin(self, place: _Place) -> _Place:
        layer, part, expert = place
        return layer, part, expert if isinstance(expert, str) else expert // self._pieces

    def _repeated(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor with its axis of experts, if it has one, repeated for the pieces."""
        for axis, (have, want) in enumerate(zip(stored.shape, shape, strict=True)):
            if have != want:
                stored = stored.repeat_interleave(want // have, axis)
        return stored.contiguous()

    def _all(self, stored: torch.Tensor, layer: int, part: str) -> torch.Tensor:
        """Return the pieces of all experts of a layer from the tensor that holds all experts."""
        rows = []
        for expert, matrix in enumerate(stored):
            axis = 1 if part == "down" else 0
            halves = matrix.chunk(2) if part == "gate_up" else (matrix,)
            for slots_W in self._slots_of(layer, expert):
                rows.append(torch.cat([_taken(half, slots_W, axis) for half in halves]))
        return torch.stack(rows)

    def _partition(self, layer: int, expert: int) -> np.ndarray:
        """Return int64 ``[m, W]``: the neurons of each piece of an expert, then `PADDING`."""
        gate, up, down = self._matrices(layer, expert)
        context = LayerContext(
            layer=layer * self._source.layout.num_experts
            + expert,  # experts of one layer differ in their random numbers
            num_experts=self._pieces,
            top_k=self._pieces,
            expert_width=-(-len(gate) // self._pieces),
            seed=self._seed,
        )
        ffn = FfnWeights(gate, up, down, torch.ones(gate.shape[1]), self._source.spec.hidden_act)
        partition = self._splitter.split(ffn, np.empty(0, np.int64), context)
        partition.check(len(gate))
        return padded_pieces(partition.experts, piece_width(len(gate), self._pieces))

    def _matrices(self, layer: int, expert: int) -> tuple[torch.Tensor, ...]:
        """Return gate ``[W, H]``, up ``[W, H]`` and down ``[H, W]`` of an expert of the source."""
        fused = self._names.get((layer, "gate_up", "all"))
        if fused is None:
            gate, up, down = (self._read(self._names[layer, part, expert]) for part in ("gate", "up", "down"))
            return gate, up, down
        gate, up = self._read(fused)[expert].chunk(2)
        return gate, up, self._read(self._names[layer, "down", "all"])[expert]


def _place(tensor: OutTensor) -> _Place | None:
    """Return what a tensor holds of the routed experts; None if it holds nothing of them."""
    origin = tensor.origin
    if not isinstance(origin, Neurons) or origin.expert == "shared" or tensor.layer is None:
        return None
    return tensor.layer, origin.part, origin.expert


def _taken(matrix: torch.Tensor, slots_W: np.ndarray, axis: int) -> torch.Tensor:
    """Return the neurons of one piece along an axis; zeros for `PADDING`."""
    slots = torch.from_numpy(slots_W)
    made = matrix.index_select(axis, slots.clamp(min=0))
    empty = slots == PADDING
    return made.index_fill(axis, empty.nonzero().flatten(), 0) if bool(empty.any()) else made
