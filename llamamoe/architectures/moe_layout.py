"""The layout of a converted model: its sizes, and the origin of each tensor of the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..lazy import torch
from ..numerics import is_power_of_two

Role = Literal[
    "embedding", "attention", "norm", "router", "routed_attention", "routed", "shared", "dense_ffn", "stub", "head", "other"
]  # fmt: skip
Part = Literal["gate", "up", "down", "gate_up"]
Weighting = Literal["renormalised", "softmax", "sigmoid"]
RouterWeighting = Literal["softmax", "renormalised", "sigmoid", "sigmoid_renormalised"]
"""Normalisation of a router's logits: softmax over all experts, the same renormalised over the selected ones, a sigmoid
of each, the same renormalised."""


@dataclass(frozen=True)
class Copy:
    """A canonical tensor as it is, times ``scale``; ``interleave`` re-orders the rows of that many heads for rotary pairs."""

    name: str
    scale: float = 1.0
    interleave: int = 0


NEARLY_ZERO = 1e-12
"""Value for the rows of a gate that must not move: its sigmoid is exactly 1/2 in float32, and yet it is not 0.

llama.cpp computes the gate of qwen2_moe's shared expert as silu(x) / x, which is NaN where x is 0.
"""


@dataclass(frozen=True)
class Constant:
    """A tensor of one number: zeros for a bias the source lacks or a stub."""

    value: float = 0.0


@dataclass(frozen=True)
class CorrectionBias(Constant):
    """Zeros for the bias that a router adds to the experts' scores, for the selection only."""


@dataclass(frozen=True)
class Stack:
    """Canonical tensors of equal shape, one below the other."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """The query heads of a layer as N = ``experts`` experts, times ``scale``.

    With G = ``groups`` key/value heads, expert j holds the j-th query head of each: its rows of ``q_proj`` (``name``) as
    ``[N, G D, H]``, or its columns of ``o_proj`` as ``[N, H, G D]``.
    """

    part: Literal["query", "output"]
    name: str
    groups: int
    experts: int
    scale: float = 1.0


@dataclass(frozen=True)
class Router:
    """The router's rows of this layer, ``[N, H]``: over the experts of the FFN, or over those of attention."""

    of: Literal["ffn", "attention"] = "ffn"


@dataclass(frozen=True)
class Neurons:
    """Rows (gate, up) or columns (down) of this layer's FFN, times ``scale``.

    ``expert`` is an index, ``"all"`` for all experts stacked into ``[N, ...]``, or ``"shared"``. ``turned`` means that rows and
    columns of each are exchanged.
    """

    part: Part
    expert: int | Literal["all", "shared"]
    scale: float = 1.0
    turned: bool = False


Origin = Copy | Stack | Constant | Router | Neurons | Heads


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write: its name, its shape, the part that it is counted as, and its origin.

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
    """The factors that turn equal router weights into the coefficient of the rescale.

    Attributes:
        weighting: Normalisation of the router's scores.
        factor: Factor of routed outputs in addition to the router's weight.
        bake: The part of ``factor`` that is baked into the experts' down projections.
        any_k: Whether the same file is right for every k.
        parity_factor: Factor by which the routed sum equals the FFN at k = N and equal weights.
    """

    weighting: Weighting
    factor: float
    bake: float
    any_k: bool
    parity_factor: float

    @property
    def bake_is_exact(self) -> bool:
        """True if baking does not round, because the factor is a power of two."""
        return is_power_of_two(self.bake)


@dataclass(frozen=True)
class MoeLayout:
    """The sizes of a converted model.

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

    def active_real(self, intermediate_size: int) -> int:
        """Return how many of the `active_neurons` are neurons of the parent, on average over the experts."""
        return self.active_neurons - self.active_padding(intermediate_size)

    def active_padding(self, intermediate_size: int) -> int:
        """Return how many of the `active_neurons` are zero neurons, on average over the experts."""
        return round(self.active_share * self.padding(intermediate_size))

    def padding(self, intermediate_size: int) -> int:
        """Return the number of zero neurons that pad the experts of one layer of F = ``intermediate_size`` neurons."""
        return self.num_experts * self.expert_width - self.copies * (intermediate_size - self.num_shared)


def weight(weighting: RouterWeighting, num_experts: int, top_k: int) -> float:
    """Return the weight of one selected expert when all logits are equal (zero)."""
    if weighting.endswith("renormalised"):
        return 1 / top_k
    return 1 / num_experts if weighting == "softmax" else 0.5


def router_scores(logits_TN: torch.Tensor, weighting: RouterWeighting) -> torch.Tensor:
    """Return the scores that a router selects by before a bias is added: softmax of the logits, or the sigmoid of each."""
    return logits_TN.softmax(-1) if softmax_scores(weighting) else logits_TN.sigmoid()


def softmax_scores(weighting: RouterWeighting) -> bool:
    """Return whether a router selects by scores that sum to one over all experts, and not by a sigmoid of each."""
    return not weighting.startswith("sigmoid")


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_tensors(
    block: str, hidden: int, layout: MoeLayout, layer: int, names: tuple[str, str, str] = PROJECTIONS
) -> Iterator[OutTensor]:
    """Yield gate, up and down of every expert as separate tensors below ``block``, called ``names``."""
    width = layout.expert_width
    for i in range(layout.num_experts):
        start = f"{block}experts.{i}."
        yield OutTensor(f"{start}{names[0]}.weight", (width, hidden), "routed", Neurons("gate", i), layer)
        yield OutTensor(f"{start}{names[1]}.weight", (width, hidden), "routed", Neurons("up", i), layer)
        down = Neurons("down", i, layout.combine.bake)
        yield OutTensor(f"{start}{names[2]}.weight", (hidden, width), "routed", down, layer)


def shared_tensors(prefix: str, hidden: int, layout: MoeLayout, bake: float, layer: int) -> Iterator[OutTensor]:
    """Yield gate, up and down of the shared expert, or of its zero stub."""
    width = layout.shared_width
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        origin: Origin = Constant()
        if layout.num_shared:
            origin = Neurons(part, "shared", bake if part == "down" else 1.0)  # type: ignore[arg-type]
        yield OutTensor(f"{prefix}{part}_proj.weight", shape, "shared" if layout.num_shared else "stub", origin, layer)
