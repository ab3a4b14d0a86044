"""One FFN layer as the methods see it: tensors in, tensors out, no file and no model class.

Names of sizes (suffixes of tensor names): ``H`` hidden_size, ``F`` intermediate_size, ``N`` num_experts (routed),
``W`` width of one expert with padding, ``S`` shared neurons, ``P`` = S + N W places for neurons, ``T`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .inputs import LayerInputs

PADDING = -1
"""The index that marks a zero neuron in ``Partition.experts``."""


@dataclass(frozen=True)
class FfnWeights:
    """The weights of one SwiGLU FFN ``y = down (act(gate x) * (up x))``, on the CPU, in the source's dtype.

    Attributes:
        gate_FH: ``[F, H]``.
        up_FH: ``[F, H]``.
        down_HF: ``[H, F]``.
        norm_H: ``[H]``, the weight of the RMSNorm before the FFN.
        hidden_act: Name of the activation, as transformers spells it.
    """

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    norm_H: torch.Tensor
    hidden_act: str = "silu"

    @property
    def intermediate_size(self) -> int:
        """``F``, the number of neurons."""
        return self.gate_FH.shape[0]

    @property
    def hidden_size(self) -> int:
        """``H``, the width of the hidden states."""
        return self.norm_H.shape[0]

    def release(self) -> None:
        """Give back the memory of matrices that can be read again; here there are none."""


@dataclass(frozen=True)
class LayerContext:
    """What a method may know about the layer it works on.

    Attributes:
        layer: Index of the layer.
        num_experts: ``N``, routed experts.
        top_k: Experts selected per token.
        expert_width: ``W``, the most neurons that one expert can hold.
        seed: The recipe's seed; use `rng` rather than this.
        calibration: What the FFN sees on the calibration text; None if there is none.
    """

    layer: int
    num_experts: int
    top_k: int
    expert_width: int
    seed: int
    calibration: LayerInputs | None = None

    @property
    def inputs(self) -> LayerInputs:
        """The calibration inputs, for methods whose ``needs`` say so (the plan refuses them without text).

        Raises:
            ValueError: There are none.
        """
        if self.calibration is None:
            raise ValueError("this method needs calibration inputs")
        return self.calibration

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
        router_NH: float32 ``[N, H]`` router rows that came with the partition (centroids, learned rows), or None.
    """

    experts: np.ndarray
    shared: np.ndarray
    omitted: np.ndarray
    router_NH: torch.Tensor | None = None

    @property
    def slots(self) -> np.ndarray:
        """int64 ``[P]``, P = S + N W: the neuron in every place, shared ones first, then expert by expert."""
        import numpy as np

        return np.concatenate([self.shared, self.experts.ravel()])

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


@dataclass(frozen=True)
class ExpertWeights:
    """Weights that replace the parent's, one row (gate, up) or column (down) for every place of `Partition.slots`.

    They are in the parent's units: the rescale's coefficient and the target's factors come on top. All zero where
    the slot is `PADDING`.

    Attributes:
        gate_PH: float32 ``[P, H]``.
        up_PH: float32 ``[P, H]``.
        down_HP: float32 ``[H, P]``.
    """

    gate_PH: torch.Tensor
    up_PH: torch.Tensor
    down_HP: torch.Tensor

    @classmethod
    def of_parent(cls, ffn: FfnWeights, partition: Partition) -> ExpertWeights:
        """The parent's own weights, copied to every place of the partition."""
        import torch

        slots = torch.from_numpy(partition.slots)
        index = slots.clamp(min=0)
        kept = (slots != PADDING).to(torch.float32)
        gate, up = ffn.gate_FH[index].float(), ffn.up_FH[index].float()
        return cls(gate * kept[:, None], up * kept[:, None], ffn.down_HF[:, index].float() * kept)
