"""The contract of a splitter: which neuron goes to which expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from ..plugin import Plugin

if TYPE_CHECKING:
    import numpy as np

    from ..layer import FfnWeights, LayerContext, Partition


class Splitter(Plugin, ABC):
    """Partitions the neurons of one FFN into routed experts of equal width, after the shared ones were taken out.

    Attributes:
        parity: ``"exact"`` if every neuron is kept exactly once, so that all experts together equal the FFN.
        default_rescale: Name of the rescale that suits this way to split.
        default_router: Name of the router used when the recipe names none.
        default_shared: Share of the neurons that are shared when the recipe says nothing.
        default_shared_by: Name of the selector used when the recipe names none.
        default_repair: Name of the repair used when the recipe names none; None for no repair.
        overlap: Whether a neuron may be in several experts.
        chooses_shared: Whether `split` chooses the shared neurons itself (S of them; the selector is not asked).
    """

    parity: ClassVar[Literal["exact", "none"]] = "exact"
    default_rescale: ClassVar[str] = "dropout"
    default_router: ClassVar[str] = "random"
    default_shared: ClassVar[float] = 0.0
    default_shared_by: ClassVar[str] = "weight_norm"
    default_repair: ClassVar[str | None] = None
    overlap: ClassVar[bool] = False
    chooses_shared: ClassVar[bool] = False

    @abstractmethod
    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """Assign every neuron that is not shared to one expert.

        Args:
            ffn: The layer's weights.
            shared: int64 ``[S]``, ascending, the shared neurons chosen by the recipe's selector (may be empty; if
                ``chooses_shared`` only their number counts).
            context: Sizes, seed and layer.

        Returns:
            The partition; ``shared`` is in it unchanged, unless the splitter chooses the shared ones itself.
        """

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """Estimate of the memory that `split` takes beyond its input, for the plan."""
        return 0


def routed_neurons(intermediate_size: int, shared: np.ndarray) -> np.ndarray:
    """int64 ``[F - S]``: the neurons that are not shared, ascending."""
    import numpy as np

    return np.setdiff1d(np.arange(intermediate_size, dtype=np.int64), shared, assume_unique=True)
