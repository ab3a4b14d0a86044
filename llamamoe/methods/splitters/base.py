"""The interface of a splitter, which partitions neurons into experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from ...lazy import np, torch
from ...plugins import Plugin
from ..layer import ExpertWeights, FfnWeights, LayerContext, Partition

Kept = Literal["neurons", "gate_up", "nothing"]
"""The part of neurons that a conversion copies bit for bit: all, gate and up rows only, or nothing."""


class Splitter(Plugin, ABC):
    """Partitions the neurons of one FFN into routed experts of equal width, after the shared ones were taken out.

    Attributes:
        parity: ``"exact"`` if every neuron is kept exactly once (or in equally many copies), so that all experts
            together equal the FFN; `exact` accounts for options.
        default_rescale: Name of the rescale that suits this method.
        default_router: Name of the router used when the recipe names none.
        default_shared: Share of the neurons that are shared if the recipe does not set it.
        default_shared_by: Name of the selector used when the recipe names none.
        default_repair: Name of the repair used when the recipe names none; None for no repair.
        overlap: Whether a neuron may be in several experts; may depend on options, so read it from an instance.
        chooses_shared: Whether `split` chooses the shared neurons itself (S of them; the selector is not used);
            may depend on options, so read it from an instance.
        routed: False if there are no experts at all: shared neurons are kept, the others omitted, no router is made
            and the result is a dense model.
    """

    parity: ClassVar[Literal["exact", "none"]] = "exact"
    default_rescale: ClassVar[str] = "dropout"
    default_router: ClassVar[str] = "random"
    default_shared: ClassVar[float] = 0.0
    default_shared_by: ClassVar[str] = "weight_norm"
    default_repair: ClassVar[str | None] = None
    overlap: bool = False
    chooses_shared: bool = False
    routed: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """True if all experts together equal the FFN, with these options."""
        return self.parity == "exact"

    @property
    def kept(self) -> Kept:
        """The part of the parent that the experts hold bit for bit, with these options."""
        return "neurons"

    @property
    def needs_clusters(self) -> bool:
        """True if `split` needs the text cluster of each token (N of them), with these options."""
        return False

    def parts(self, num_experts: int) -> int:
        """Return how many of the N experts together hold every routed neuron once: N, less if experts are copies.

        An expert is wide enough for its share, ``ceil((F - S) / parts)`` neurons.
        """
        return num_experts if self.routed else 0

    def refusals(self, num_experts: int, top_k: int, router_scale: str) -> list[str]:
        """Return the reasons why these sizes are invalid, as clauses; empty if they are valid."""
        return []

    @abstractmethod
    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """Assign every neuron that is not shared to one expert.

        Args:
            ffn: The layer's weights.
            shared: int64 ``[S]``, ascending, the shared neurons chosen by the recipe's selector (may be empty; if
                ``chooses_shared``, only their number matters).
            context: Sizes, seed and layer.

        Returns:
            The partition; it contains ``shared`` unchanged, unless the splitter chooses the shared ones itself.
        """

    def weights(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> ExpertWeights | None:
        """Return initial weights that replace the parent's, for every place of the partition; None for the parent's."""
        return None

    def tie(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Return float32 ``[N, H]``: router rows in the form that this method needs (some may have to be equal)."""
        return rows_NH

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """Return an estimate of the memory that `split` takes beyond its input, for the plan."""
        return 0


def routed_neurons(intermediate_size: int, shared: np.ndarray) -> np.ndarray:
    """Return int64 ``[F - S]``: the neurons that are not shared, ascending."""
    return np.setdiff1d(np.arange(intermediate_size, dtype=np.int64), shared, assume_unique=True)
