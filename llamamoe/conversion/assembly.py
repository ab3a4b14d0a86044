"""Make a target's tensors from one layer's weights, partition and router."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import assert_never

from ..architectures.dense_checkpoint import DenseModel
from ..architectures.moe_layout import Constant, Copy, Heads, MoeLayout, Neurons, OutTensor, Router, Stack
from ..checkpoint.memory import empty_bytes
from ..checkpoint.tensors import cast, interleave, torch_dtype
from ..lazy import np, torch
from ..methods.attention import RoutedHeads
from ..methods.layer import PADDING, ExpertWeights, FfnWeights, Partition
from ..numerics import is_power_of_two


def take(tensor: torch.Tensor, index: np.ndarray, axis: int) -> torch.Tensor:
    """Return rows (axis 0) or columns (axis 1) of a matrix, bit for bit; `PADDING` gives zeros.

    All of them in their order, as an expert that is a whole FFN has them, are the matrix itself, not a copy. Columns are taken in blocks of rows that fit the cache, which is several times faster than
    ``index_select`` for 16-bit types.
    """
    if np.array_equal(index, np.arange(tensor.shape[axis])):
        return tensor.contiguous()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    source = tensor.contiguous().view(bits).numpy()
    shape = (len(index), source.shape[1]) if axis == 0 else (source.shape[0], len(index))
    out = empty_bytes(prod(shape) * source.itemsize).view(source.dtype).reshape(shape)
    step = source.shape[0] if axis == 0 else 256
    for start in range(0, source.shape[0], step):
        block = slice(None) if axis == 0 else slice(start, start + step)
        np.take(source[block], index, axis=axis, out=out[block], mode="clip")
    padding = index == PADDING
    if padding.any():
        out[padding if axis == 0 else (slice(None), padding)] = 0
    return torch.from_numpy(out).view(tensor.dtype)


@dataclass
class LayerParts:
    """The pieces of one converted layer. Tensors are made on demand, reading only the matrices that they need.

    Attributes:
        ffn: The dense layer.
        partition: The partition of its neurons.
        router_NH: float32 rows, scaled as they will be stored.
        layout: Sizes and scales.
        weights: If given (repair, re-initialised copies), these are written, place by place, instead of the
            parent's neurons.
        heads: Router and output projection of the attention; None if attention is not routed.
    """

    ffn: FfnWeights
    partition: Partition
    router_NH: torch.Tensor
    layout: MoeLayout
    weights: ExpertWeights | None = None
    heads: RoutedHeads | None = None
    _part: str = field(default="", init=False)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down from which tensors are taken: the parent's by neuron, or given ones by place."""
        return self._matrix("gate"), self._matrix("up"), self._matrix("down")

    def _matrix(self, part: str) -> torch.Tensor:
        names = {"gate": ("gate_FH", "gate_PH"), "up": ("up_FH", "up_PH"), "down": ("down_HF", "down_HP")}[part]
        matrix: torch.Tensor = getattr(self.ffn, names[0]) if self.weights is None else getattr(self.weights, names[1])
        return matrix

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[shared_width]`` and ``[N, W]``: rows of `matrices` for the shared expert and each routed one."""
        shared, experts = self.partition.shared, self.partition.experts
        if self.weights is not None:
            count = len(shared)
            places = np.arange(count, count + experts.size, dtype=np.int64).reshape(experts.shape)
            shared, experts = np.arange(count, dtype=np.int64), np.where(experts == PADDING, PADDING, places)
        padding = np.full(self.layout.shared_width - len(shared), PADDING, np.int64)
        return np.concatenate([shared, padding]), experts

    def router(self, origin: Router) -> torch.Tensor:
        """Return the rows of one of the layer's routers, float32 ``[N, H]``."""
        if origin.of == "ffn":
            return self.router_NH
        assert self.heads is not None
        return self.heads.router_NH

    def neurons(self, origin: Neurons, dtype: torch.dtype) -> torch.Tensor:
        """Return the part of one expert, of the shared expert, or of all experts stacked (see `Neurons`)."""
        if origin.expert == "all":
            parts = (self.neurons(Neurons(origin.part, i, origin.scale), dtype) for i in range(self.layout.num_experts))
            parts = (part.T for part in parts) if origin.turned else parts
            first = next(parts)
            out = torch.empty(self.layout.num_experts, *first.shape, dtype=dtype)
            out[0] = first
            for i, part in enumerate(parts, start=1):
                out[i] = part
            return out
        shared, experts = self._index
        index = shared if origin.expert == "shared" else experts[origin.expert]
        if origin.part != self._part:  # parts are made one after another: matrices of the last one are released
            self.ffn.release()
            self._part = origin.part
        if origin.part == "gate_up":
            halves = [take(self._matrix(part), index, 0) for part in ("gate", "up")]
            return cast(torch.cat(halves), dtype, origin.scale)
        matrix = self._matrix(origin.part)
        taken = take(matrix, index, int(origin.part == "down"))
        if taken.dtype == dtype and is_power_of_two(origin.scale) and (origin.scale == 1.0 or taken is not matrix):
            return taken.mul_(origin.scale) if origin.scale != 1.0 else taken  # as `cast`, without another copy
        return cast(taken, dtype, origin.scale)


def make(tensor: OutTensor, model: DenseModel, parts: LayerParts | None, default_dtype: str) -> torch.Tensor:
    """Return one tensor of the output, contiguous, on the CPU.

    Args:
        tensor: The tensor to make.
        model: The dense checkpoint.
        parts: The pieces of the tensor's layer, if it is a MoE layer.
        default_dtype: Safetensors name of the dtype of tensors that name none.
    """
    dtype = torch_dtype(tensor.dtype or default_dtype)
    origin = tensor.origin
    if isinstance(origin, Constant):
        return torch.full(tensor.shape, origin.value, dtype=dtype)
    if isinstance(origin, Copy):
        value = cast(model.read(origin.name), dtype, origin.scale)
        return (interleave(value, origin.interleave) if origin.interleave else value).contiguous()
    if isinstance(origin, Stack):
        return torch.cat([cast(model.read(name), dtype) for name in origin.names])
    if isinstance(origin, Heads):
        fitted = parts is not None and parts.heads is not None and origin.part == "output"
        matrix = parts.heads.output_HQ if fitted else model.read(origin.name)  # type: ignore[union-attr]
        return cast(by_head(matrix, origin), dtype, origin.scale).contiguous()
    assert parts is not None, tensor.name
    if isinstance(origin, Router):
        return parts.router(origin).to(dtype)
    if isinstance(origin, Neurons):
        return parts.neurons(origin, dtype).contiguous()
    assert_never(origin)


def is_parents(tensor: OutTensor, *, repaired: bool) -> bool:
    """Return whether a tensor follows from the parent alone: copied, constant, or query heads that no repair refits."""
    origin = tensor.origin
    if isinstance(origin, Heads):
        return origin.part == "query" or not repaired
    return isinstance(origin, Copy | Stack | Constant)


def by_head(matrix: torch.Tensor, origin: Heads) -> torch.Tensor:
    """Return ``q_proj [G N D, H]`` as ``[N, G D, H]``, or ``o_proj [H, G N D]`` as ``[N, H, G D]`` (see `Heads`)."""
    groups, count = origin.groups, origin.experts
    if origin.part == "query":
        return matrix.reshape(groups, count, -1, matrix.shape[1]).transpose(0, 1).flatten(1, 2)
    return matrix.reshape(len(matrix), groups, count, -1).permute(2, 0, 1, 3).flatten(2)


def made_of(tensor: OutTensor, model: DenseModel, parts: LayerParts | None) -> list[torch.Tensor]:
    """Return the tensors that `make` uses for this one, before any cast (for a router, its rows)."""
    origin = tensor.origin
    if isinstance(origin, Copy | Heads):
        return [model.read(origin.name)]
    if isinstance(origin, Stack):
        return [model.read(name) for name in origin.names]
    if isinstance(origin, Neurons) and parts is not None:
        return list(parts.matrices)
    return [parts.router(origin)] if isinstance(origin, Router) and parts is not None else []


def router_dtype(tensors: Iterable[OutTensor], default: str) -> str:
    """Return the safetensors name of the dtype in which a target stores its router."""
    return next((t.dtype for t in tensors if isinstance(t.origin, Router) and t.dtype), default)
