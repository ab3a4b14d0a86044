"""One layer in alignment: its start, its learned quantities and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..lazy import torch
from ..methods.layer import PADDING, ExpertWeights, FfnWeights, LayerContext, Partition
from .assignment import Assignment
from .choices import Choices

if TYPE_CHECKING:
    from .gated import GatedFfn


@dataclass(frozen=True)
class AlignedLayer:
    """One layer as alignment learned it.

    Attributes:
        partition: The partition, with the router's rows if there are experts.
        scales_F: float32 ``[F]``, factor of each neuron's output; None means all ones.
        matrices: gate ``[F, H]``, up ``[F, H]`` and down ``[H, F]``, float32; None for the parent's.
    """

    partition: Partition
    scales_F: torch.Tensor | None = None
    matrices: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def of(cls, ffn: FfnWeights, partition: Partition, weights: ExpertWeights | None) -> AlignedLayer:
        """Return a converted layer with each neuron in one place; ``weights`` None means the parent's."""
        if weights is None:
            return cls(partition)
        gate_FH, up_FH, down_HF = (m.to(torch.float32, copy=True) for m in (ffn.gate_FH, ffn.up_FH, ffn.down_HF))
        slots = torch.from_numpy(partition.slots)
        places = (slots != PADDING).nonzero().flatten()
        neurons = slots[places]
        gate_FH[neurons], up_FH[neurons] = weights.gate_PH[places].cpu(), weights.up_PH[places].cpu()
        down_HF[:, neurons] = weights.down_HP[:, places].cpu()
        return cls(partition, matrices=(gate_FH, up_FH, down_HF))

    def weights(self, ffn: FfnWeights) -> ExpertWeights | None:
        """Return the weights of every place; None if they are the parent's."""
        if self.scales_F is None and self.matrices is None:
            return None
        gate_FH, up_FH, down_HF = self.matrices or (ffn.gate_FH, ffn.up_FH, ffn.down_HF)
        if self.scales_F is not None:
            down_HF = down_HF.float() * self.scales_F
        return ExpertWeights.of_parent(FfnWeights(gate_FH, up_FH, down_HF, ffn.norm_H, ffn.hidden_act), self.partition)


@dataclass(frozen=True)
class Start:
    """One converted layer before it is aligned.

    Attributes:
        layer: Partition, with the router's rows, float32 ``[N, H]``, if there are experts; and weights, if they are not
            the parent's.
        context: Sizes of the layer.
        coefficient: Factor of a selected expert's output.
    """

    layer: AlignedLayer
    context: LayerContext
    coefficient: float

    @property
    def partition(self) -> Partition:
        """The partition of the layer, router rows included."""
        return self.layer.partition


@dataclass
class Learned:
    """The learned quantities of one layer; an optimiser changes them in place.

    Attributes:
        start: The layer before alignment.
        assignment: Assignment of its neurons to places.
        rows_NH: The router's rows.
        scales_F: Factors of the neurons' outputs; None if they are not learned.
        weights: gate, up and down, float32; None while they are the parent's.
        ffn: The module that runs in the model.
    """

    start: Start
    assignment: Assignment
    rows_NH: torch.Tensor
    scales_F: torch.Tensor | None
    weights: tuple[torch.Tensor, ...] | None
    ffn: GatedFfn
    one_hot_FC: torch.Tensor = field(init=False)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """All learned tensors by name."""
        named = {"logits": self.assignment.logits_FC, "rows": self.rows_NH}
        if self.scales_F is not None:
            named["scales"] = self.scales_F
        return named | dict(zip(("gate", "up", "down"), self.weights or (), strict=False))

    @property
    def now(self) -> AlignedLayer:
        """The layer in its current state, on the CPU."""
        rows = self.rows_NH.detach().cpu().clone() if len(self.rows_NH) else None
        part = self.assignment.partition(self.start.context, rows)
        scales = None if self.scales_F is None else self.scales_F.detach().cpu().clone()
        weights = None if self.weights is None else tuple(w.detach().cpu().clone() for w in self.weights)
        return AlignedLayer(part, scales, weights)

    def choose(self, temperature: float, *, learning: bool) -> None:
        """Gate the FFN by the current state."""
        self.one_hot_FC = self.assignment.one_hot().requires_grad_(learning and self.assignment.logits_FC.requires_grad)
        top_k, coefficient = self.start.context.top_k, self.start.coefficient
        self.ffn.choices = Choices(
            self.rows_NH, self.one_hot_FC, top_k, coefficient, temperature, self.scales_F, self.weights
        )


def moved(before: Partition, after: Partition) -> float:
    """Return the share of the neurons that changed their place."""
    return float((before.places() != after.places()).mean())
