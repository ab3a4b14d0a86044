"""The place of every neuron of one FFN: learned logits, exactly balanced choices, a soft plan for their gradient.

Size names in addition to those of `llamamoe.methods.layer`: ``C`` places, which are the N experts and, where a layer
has them, the shared neurons (every token uses them) and the omitted ones (none does).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..lazy import np, torch
from ..methods.layer import LayerContext, Partition
from ..methods.solvers.balance import assign_with_prices
from ..methods.solvers.learned_assignment import one_hot
from ..methods.solvers.transport import balanced_transport, transport_gradient

SINKHORN_ITERATIONS = 20
"""Iterations per step; each step starts from the prices of the last one."""
NEVER = 1e3
"""Penalty, beyond any neuron's logit, for padding in a place that must hold none."""


@dataclass
class Assignment:
    """Logits ``[F, C]`` of a partition, and the best partition of the same sizes for them.

    Attributes:
        logits_FC: float32, changed in place by an optimiser, on the device.
        places_C: int64, how many neurons each place holds at most (padding included).
        num_experts: ``N``; the places after them are the shared and the omitted neurons.
        labels_F: int64, the place of each neuron.
    """

    logits_FC: torch.Tensor
    places_C: np.ndarray
    num_experts: int
    labels_F: np.ndarray
    _prices_C: np.ndarray | None = None
    _soft_prices_C: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, partition: Partition, margin: float, device: torch.device) -> Assignment:
        """Return the start: every neuron's own place leads by ``margin``, all others are equal."""
        (experts, width), labels = partition.experts.shape, partition.places()
        places = np.array([width] * experts + [len(partition.shared), len(partition.omitted)], np.int64)
        logits = torch.zeros(len(labels), len(places))
        logits[torch.arange(len(labels)), torch.from_numpy(labels)] = margin
        return cls(logits.to(device), places, experts, labels)

    def one_hot(self) -> torch.Tensor:
        """Return float32 ``[F, C]``: 1 at each neuron's place."""
        return one_hot(self.labels_F, len(self.places_C), self.logits_FC.device)

    def assign(self) -> None:
        """Find the exactly balanced partition with the largest sum of logits. O(F C^2).

        Zero neurons that pad the experts take part at no cost, so that the other places are filled exactly.
        """
        used = self.places_C > 0
        logits = self.logits_FC.detach().cpu().double().numpy()[:, used]
        padding = np.zeros((int(self.places_C.sum()) - len(logits), logits.shape[1]))
        padding[:, np.flatnonzero(used) >= self.num_experts] = -NEVER * (1 + np.abs(logits).max())
        cost = -np.concatenate([logits, padding])
        labels, self._prices_C = assign_with_prices(cost, self.places_C[used], self._prices_C)
        self.labels_F = np.flatnonzero(used)[labels[: len(logits)]]

    def plan(self, temperature: float) -> torch.Tensor:
        """Return the soft plan ``[F, C]`` that keeps the size of each place. See `balanced_transport`."""
        sizes_C = np.bincount(self.labels_F, minlength=len(self.places_C))
        used = torch.from_numpy(sizes_C > 0).to(self.logits_FC.device)
        sizes = torch.from_numpy(sizes_C).to(self.logits_FC)[used]
        plan, self._soft_prices_C = balanced_transport(
            self.logits_FC[:, used], temperature, SINKHORN_ITERATIONS, self._soft_prices_C, sizes
        )
        whole = torch.zeros_like(self.logits_FC)
        whole[:, used] = plan
        return whole

    def pull_back(self, gradient_FC: torch.Tensor, temperature: float) -> None:
        """Put the logits' gradient into ``logits_FC.grad``, from that of the one-hot choices, through the soft plan."""
        plan_FC = self.plan(temperature)
        used = plan_FC.sum(0) > 0
        whole = torch.zeros_like(self.logits_FC)
        whole[:, used] = transport_gradient(plan_FC[:, used], gradient_FC[:, used].float(), temperature)
        self.logits_FC.grad = whole

    def partition(self, context: LayerContext, rows_NH: torch.Tensor | None) -> Partition:
        """Return the current partition of the neurons, with these router rows."""
        routed = np.flatnonzero(self.labels_F < self.num_experts)
        shared, omitted = (np.flatnonzero(self.labels_F == self.num_experts + i) for i in (0, 1))
        if not self.num_experts:
            return Partition(np.empty((context.num_experts, context.expert_width), np.int64), shared, omitted)
        made = Partition.from_labels(routed, self.labels_F[routed], context, shared)
        return Partition(made.experts, made.shared, omitted.astype(np.int64), rows_NH)
