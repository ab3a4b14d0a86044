"""One FFN layer as the methods see it: tensors in, tensors out, no file and no model class.

Names of sizes (suffixes of tensor names): ``H`` hidden_size, ``F`` intermediate_size, ``N`` num_experts (routed),
``W`` width of one expert with padding, ``S`` shared neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

PADDING = -1
"""The index that marks a zero neuron in ``Partition.experts``."""


@dataclass(frozen=True)
class FfnWeights:
    """The weights of one SwiGLU FFN ``y = down (act(gate x) * (up x))``, on the CPU, in the source's dtype.

    They may be memory-mapped from the source: never write to them.

    Attributes:
        gate_FH: ``[F, H]``.
        up_FH: ``[F, H]``.
        down_HF: ``[H, F]``.
        norm_H: ``[H]``, the weight of the RMSNorm before the FFN.
    """

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    norm_H: torch.Tensor

    @property
    def intermediate_size(self) -> int:
        """``F``, the number of neurons."""
        return self.gate_FH.shape[0]


@dataclass(frozen=True)
class LayerContext:
    """What a method may know about the layer it works on.

    Attributes:
        layer: Index of the layer.
        num_experts: ``N``, routed experts.
        top_k: Experts selected per token.
        expert_width: ``W``, the most neurons that one expert can hold.
        seed: The recipe's seed; use `rng` rather than this.
    """

    layer: int
    num_experts: int
    top_k: int
    expert_width: int
    seed: int

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator that depends on seed, layer and purpose only (not on the order of layers or resumes)."""
        import numpy as np

        return np.random.default_rng([self.seed, self.layer, *purpose.encode()])


@dataclass(frozen=True)
class Partition:
    """Which neuron goes where.

    Attributes:
        experts: int64 ``[N, W]``; neuron indices in ascending order, then `PADDING` (-1) for zero neurons.
        shared: int64 ``[S]``, ascending; neurons that every token uses.
        omitted: int64, ascending; neurons that are dropped (empty for every exact splitter).
    """

    experts: np.ndarray
    shared: np.ndarray
    omitted: np.ndarray

    @classmethod
    def from_labels(
        cls, neurons: np.ndarray, labels: np.ndarray, context: LayerContext, shared: np.ndarray
    ) -> Partition:
        """Build from a label per neuron.

        Args:
            neurons: int64 ``[F - S]``, the neurons that are routed.
            labels: int ``[F - S]``, the expert of each of them, 0 .. N-1.
            context: Gives N and W.
            shared: int64 ``[S]``.

        Raises:
            ValueError: An expert would get more neurons than its width holds.
        """
        import numpy as np

        sizes = np.bincount(labels, minlength=context.num_experts)
        if sizes.max(initial=0) > context.expert_width or len(sizes) > context.num_experts:
            raise ValueError(f"expert sizes {sizes.tolist()} do not fit {context.num_experts} x {context.expert_width}")
        order = np.lexsort((neurons, labels))
        experts = np.full((context.num_experts, context.expert_width), PADDING, dtype=np.int64)
        column = np.arange(len(neurons)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        experts[labels[order], column] = neurons[order]
        return cls(experts, np.sort(shared).astype(np.int64), np.empty(0, np.int64))

    def check(self, intermediate_size: int, *, overlap: bool = False) -> None:
        """Assert that each of the F neurons appears exactly once (at least once if ``overlap``).

        Raises:
            ValueError: A neuron is missing, repeated or out of range.
        """
        import numpy as np

        used = np.concatenate([self.experts.ravel(), self.shared, self.omitted])
        used = used[used != PADDING]
        if used.size and (used.min() < 0 or used.max() >= intermediate_size):
            raise ValueError(f"neuron indices must lie in 0..{intermediate_size - 1}")
        counts = np.bincount(used, minlength=intermediate_size)
        wrong = np.flatnonzero(counts < 1 if overlap else counts != 1)
        if wrong.size:
            raise ValueError(
                f"{wrong.size} neurons do not appear exactly once, the first is {wrong[0]} ({counts[wrong[0]]} times)"
            )
