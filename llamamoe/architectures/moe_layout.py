"""A converted model on paper: its sizes, and what each tensor of the output is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..numerics import is_power_of_two

Role = Literal["embedding", "attention", "norm", "router", "routed", "shared", "dense_ffn", "stub", "head"]
Part = Literal["gate", "up", "down", "gate_up"]
Weighting = Literal["renormalised", "softmax", "sigmoid"]
RouterWeighting = Literal["softmax", "renormalised", "sigmoid", "sigmoid_renormalised"]
"""What a router makes of its logits: softmax over all experts, the same renormalised over the selected ones, a sigmoid
of each, the same renormalised."""


@dataclass(frozen=True)
class Copy:
    """A canonical tensor as it is, times ``scale``; ``interleave`` re-orders the rows of that many heads for rotary pairs."""

    name: str
    scale: float = 1.0
    interleave: int = 0


NEARLY_ZERO = 1e-12
"""For the rows of a gate that must not move: a sigmoid of them is 1/2 to the last bit of float32, and yet they are not 0.

llama.cpp computes the gate of qwen2_moe's shared expert as silu(x) / x, which is no number where x is 0.
"""


@dataclass(frozen=True)
class Constant:
    """A tensor of one number: zeros for a bias the source lacks or a stub."""

    value: float = 0.0


@dataclass(frozen=True)
class Router:
    """The router's rows of this layer, ``[N, H]``."""


@dataclass(frozen=True)
class Neurons:
    """Rows (gate, up) or columns (down) of this layer's FFN, times ``scale``.

    ``expert`` is an index, ``"all"`` for all experts stacked into ``[N, ...]``, or ``"shared"``.
    """

    part: Part
    expert: int | Literal["all", "shared"]
    scale: float = 1.0


Origin = Copy | Constant | Router | Neurons


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write: what it is called, its shape, what it counts as, and what it is made of.

    ``dtype`` None means the dtype of the conversion; ``layer`` None means that it belongs to no layer.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    origin: Origin
    layer: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Combine:
    """How equal router weights become the coefficient that the rescale asks for.

    Attributes:
        weighting: What the router does with its scores.
        factor: What routed outputs are multiplied by, beyond the router's weight.
        bake: The part of ``factor`` that is baked into the experts' down projections.
        any_k: Whether the same file is right for every k.
        parity_factor: What the routed sum must be multiplied by, at k = N and equal weights, to equal the FFN.
    """

    weighting: Weighting
    factor: float
    bake: float
    any_k: bool
    parity_factor: float

    @property
    def bake_is_exact(self) -> bool:
        """Whether baking rounds nothing: the factor is a power of two."""
        return is_power_of_two(self.bake)


@dataclass(frozen=True)
class MoeLayout:
    """The decided sizes of a conversion.

    Attributes:
        num_experts: N.
        top_k: k.
        expert_width: W, padding included.
        num_shared: S, real neurons.
        shared_width: Width of the shared expert as stored, zero padding included (0 if the target stores none).
        dense_layers: Layers that stay dense, ascending.
        combine: See `Combine`.
        copies: How many experts hold each routed neuron: 1 for a partition, more for upcycling, 0 if there are no
            experts.
    """

    num_experts: int
    top_k: int
    expert_width: int
    num_shared: int
    shared_width: int
    dense_layers: tuple[int, ...]
    combine: Combine
    copies: int = 1

    @property
    def active_share(self) -> float:
        """k/N, the share of the routed experts that one token uses (0 if there are none)."""
        return self.top_k / self.num_experts if self.num_experts else 0.0

    @property
    def active_neurons(self) -> int:
        """Neurons of one layer that a token uses, padding included: S + k W."""
        return self.num_shared + self.top_k * self.expert_width

    def padding(self, intermediate_size: int) -> int:
        """Zero neurons that pad the experts of one layer of F = ``intermediate_size`` neurons."""
        return self.num_experts * self.expert_width - self.copies * (intermediate_size - self.num_shared)


def weight(weighting: RouterWeighting, num_experts: int, top_k: int) -> float:
    """What one selected expert's weight is when all logits are equal (zero)."""
    if weighting.endswith("renormalised"):
        return 1 / top_k
    return 1 / num_experts if weighting == "softmax" else 0.5


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_tensors(
    block: str, hidden: int, layout: MoeLayout, layer: int, names: tuple[str, str, str] = PROJECTIONS
) -> Iterator[OutTensor]:
    """Gate, up and down of every expert as tensors of their own, below ``block``; ``names`` is what they are called."""
    width = layout.expert_width
    for i in range(layout.num_experts):
        start = f"{block}experts.{i}."
        yield OutTensor(f"{start}{names[0]}.weight", (width, hidden), "routed", Neurons("gate", i), layer)
        yield OutTensor(f"{start}{names[1]}.weight", (width, hidden), "routed", Neurons("up", i), layer)
        down = Neurons("down", i, layout.combine.bake)
        yield OutTensor(f"{start}{names[2]}.weight", (hidden, width), "routed", down, layer)


def shared_tensors(prefix: str, hidden: int, layout: MoeLayout, bake: float, layer: int) -> Iterator[OutTensor]:
    """Gate, up and down of the shared expert, or of its zero stub."""
    width = layout.shared_width
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        origin: Origin = Constant()
        if layout.num_shared:
            origin = Neurons(part, "shared", bake if part == "down" else 1.0)  # type: ignore[arg-type]
        yield OutTensor(f"{prefix}{part}_proj.weight", shape, "shared" if layout.num_shared else "stub", origin, layer)
