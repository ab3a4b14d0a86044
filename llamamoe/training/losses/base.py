"""The interface of a routing loss, a function of the routing of a window of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from ...lazy import torch
from ...plugins import Plugin, PluginOptions
from ..gates.base import Gate
from ..routing import Routing

Window = Literal["micro_batch", "all_ranks"]
"""The tokens that are balanced together: one rank's micro-batch, or the micro-batches of all ranks at that moment."""
WINDOWS: dict[Window, str] = {
    "micro_batch": "the tokens of one micro-batch, on one rank",
    "all_ranks": "the tokens of the micro-batches that all ranks have at a moment",
}
"""Descriptions of the windows, for the log."""


@dataclass(frozen=True)
class LossContext:
    """The context of a loss beside the routing.

    Attributes:
        all_reduce: Sums a tensor over ranks, with a gradient (`ranks.sum_over_ranks`); used by losses whose window is
            ``"all_ranks"``. None in a run of one process.
        targets: Targets of a layer's routing: ``r_TH``, the joint output of its routed experts for the T tokens (the
            parent's FFN output minus that of the shared neurons), without gradient. Only used by `competitive`.
    """

    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    targets: Callable[[Routing], torch.Tensor] | None = None

    def reduce(self, values: torch.Tensor, window: Window) -> torch.Tensor:
        """Return the sum over the ranks that the window spans, with a gradient."""
        if window == "micro_batch" or self.all_reduce is None:
            return values
        return self.all_reduce(values)


class RoutingLoss(Plugin, ABC):
    """A term of the training loss that is a function of the routers' decisions.

    Attributes:
        linear: Whether it is a sum over tokens, and so the same for any split of a global batch.
        needs_inputs: Whether it needs ``Routing.inputs_TH`` (``tap.armed(inputs=True)``).
        needs_targets: Whether it needs ``LossContext.targets``.
    """

    linear: ClassVar[bool]
    needs_inputs: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False

    class Options(PluginOptions):
        """Options of every routing loss."""

        coefficient: float = Field(0.01, ge=0, allow_inf_nan=False, description="What the loss is multiplied by.")

    options: Options

    def loss(self, routings: Sequence[Routing], context: LossContext) -> torch.Tensor:
        """Return the loss without its coefficient: the mean over layers of `layer_loss`.

        Args:
            routings: One per layer, of one forward pass.
            context: The sum over ranks, and further inputs of the loss.

        Returns:
            float32 scalar (float64 of float64 logits). Linear losses: the sum over tokens, which the caller divides by
            the number of tokens of the global batch. Others: the value for the window's tokens, which the caller
            averages over windows.
        """
        losses = [self.layer_loss(routing, context) for routing in routings]
        return torch.stack([each.to(losses[0].device) for each in losses]).mean()

    @abstractmethod
    def layer_loss(self, routing: Routing, context: LossContext) -> torch.Tensor:
        """Return the loss of one layer, a scalar; see `loss`. Pooled layers would cancel opposite imbalances."""

    @property
    def window(self) -> Window | None:
        """The tokens that are balanced together; None for a linear loss, for which it does not matter."""
        return self.options.window if isinstance(self.options, WindowOptions) else None

    @property
    def trains_experts(self) -> bool:
        """True if it has a gradient for the experts' weights, not only for what routes."""
        return False

    def kept_TN(self, *, noisy: bool) -> int:
        """Return how many float32 arrays ``[T, N]`` of a layer its gradient keeps; for the estimate of a run.

        Args:
            noisy: Whether the gate returns its selection noise.
        """
        return 1

    def working_numbers(self, tokens: int, num_experts: int, hidden_size: int, width: int) -> int:
        """Return the peak number of float32 values in the loss of one layer; for the estimate.

        Arrays ``[T, N]`` are too small to count.

        Args:
            tokens: T.
            num_experts: N.
            hidden_size: H.
            width: W.
        """
        return 0

    def notes(self, gate: Gate) -> list[str]:
        """Return remarks on this loss together with this gate, for the log and the plan."""
        return []


class WindowOptions(RoutingLoss.Options):
    """Options of a loss that is not linear in the batch."""

    window: Window = Field(
        "micro_batch", description="Whose tokens are balanced together: one micro-batch, or those of all ranks."
    )
