"""Learn the assignment of neurons and a router's rows together, keeping a layer's output near the dense one.

Names of sizes, beside those of `llamamoe.methods.layer`: ``R`` = F - S routed neurons, ``B`` tokens of a mini-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pydantic import Field

from ...lazy import np, torch
from ...plugins import PluginOptions
from ..layer import FfnWeights, LayerContext, LayerInputs, activate
from .balance import assign_with_prices
from .transport import balanced_transport, soft_top_k, transport_gradient

MARGIN = 0.5
"""Lead of a neuron's initial expert, in standard deviations of its logits."""
LEAST_SPREAD = 1e-6
"""Lower bound of the spread of a router's logits."""


class LearningOptions(PluginOptions):
    """Rates, temperatures and steps of `Learner`."""

    steps: int = Field(200, ge=0, description="Steps of Adam.")
    batch: int = Field(2048, ge=1, description="Tokens per step.")
    lr_assignment: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="Rate of the assignment logits, which start at deviation 1."
    )
    lr_router: float = Field(
        0.001, ge=0, allow_inf_nan=False, description="Rate of the router's rows, as a share of their own size."
    )
    tau_start: float = Field(1.0, gt=0, allow_inf_nan=False, description="First temperature of the assignment.")
    tau_end: float = Field(0.1, gt=0, allow_inf_nan=False, description="Last temperature of the assignment.")
    router_temperature: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="Temperature of the soft choice of experts, in units of the logits' spread.",
    )
    sinkhorn_iterations: int = Field(
        20, ge=1, description="Iterations per step; each step continues from the last one."
    )
    refresh: int = Field(10, ge=1, description="Steps between two exact assignments.")
    balance: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Strength of a load-balancing loss; 1 is as large as the error."
    )


@dataclass(frozen=True)
class RoutedNeurons:
    """The part of an FFN that is routed, on the inputs' device in their compute dtype.

    Attributes:
        inputs: The calibration inputs.
        gate_RH: ``[R, H]``.
        up_RH: ``[R, H]``.
        down_HR: ``[H, R]``.
        hidden_act: Name of the activation.
        scales_T: float32 ``[T]``, factor of each token's error; None for all ones.
    """

    inputs: LayerInputs
    gate_RH: torch.Tensor
    up_RH: torch.Tensor
    down_HR: torch.Tensor
    hidden_act: str
    scales_T: torch.Tensor | None

    @classmethod
    def of(
        cls, ffn: FfnWeights, neurons: np.ndarray, inputs: LayerInputs, scales_T: torch.Tensor | None
    ) -> RoutedNeurons:
        """Return the part of the FFN with ``neurons``, int64 ``[R]``."""
        index, to = torch.from_numpy(neurons), (inputs.device, inputs.compute_dtype)
        weights = ffn.gate_FH[index].to(*to), ffn.up_FH[index].to(*to), ffn.down_HF[:, index].to(*to)
        return cls(inputs, *weights, ffn.hidden_act, scales_T)

    def tokens(self, index_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs ``[B, H]`` in float32, and the activations times the token's scale, float32 ``[B, R]``."""
        device = self.inputs.device
        x_BH = self.inputs.x_TH[index_B].to(device, self.inputs.compute_dtype)
        h_BR = activate(x_BH @ self.gate_RH.T, self.hidden_act) * (x_BH @ self.up_RH.T).float()
        if self.scales_T is not None:
            h_BR *= self.scales_T[index_B].to(device)[:, None]
        return x_BH.float(), h_BR

    def errors(self, h_BR: torch.Tensor, selection_BN: torch.Tensor, assignment_RN: torch.Tensor) -> torch.Tensor:
        """Return ``||sum_j (1 - sum_c z_tc P_jc) h_tj d_j||^2`` for each token, float32 ``[B]``. O(B R (N + H)).

        This is the squared error of the output: shared neurons contribute equally to the dense output, and each routed
        one is missing to the extent that its expert is not selected.
        """
        missing_BR = h_BR * (1 - selection_BN @ assignment_RN.T)
        error_BH = (missing_BR.to(self.down_HR.dtype) @ self.down_HR.T).float()
        return error_BH.square().sum(1)

    def switching_errors(self, h_BR: torch.Tensor, selection_BN: torch.Tensor, labels_R: np.ndarray) -> torch.Tensor:
        """Return the second-order error of a token if one expert is switched on or off, float32 ``[B, N]``. O(B R H).

        ``||E_c||^2``, negative where c is selected: with the derivative it is the slope from z_c to 1 - z_c.
        """
        sizes = []
        for expert in range(selection_BN.shape[1]):
            members = torch.from_numpy(np.flatnonzero(labels_R == expert)).to(h_BR.device)
            out_BH = h_BR[:, members].to(self.down_HR.dtype) @ self.down_HR[:, members].T
            sizes.append(out_BH.float().square().sum(1))
        return torch.stack(sizes, 1) * (1 - 2 * selection_BN)

    def moving_errors(self, h_BR: torch.Tensor, selection_BN: torch.Tensor, labels_R: np.ndarray) -> torch.Tensor:
        """Return the second-order sum of errors if one neuron moves to an expert, float32 ``[R, N]``. O(B R N).

        ``sum_t (z_t,e(j) - z_tc)^2 h_tj^2 ||d_j||^2``, 0 for its own expert e(j): with the differences of the
        derivative between c and e(j) it is the effect of the move.
        """
        own_BR = selection_BN[:, torch.from_numpy(labels_R).to(h_BR.device)]
        square_BR = h_BR.square()
        # z is 0 or 1: (z_e - z_c)^2 = z_e + z_c - 2 z_e z_c
        power_RN = square_BR.T @ selection_BN - 2 * ((square_BR * own_BR).T @ selection_BN)
        power_RN += (square_BR * own_BR).sum(0)[:, None]
        return power_RN * self.down_HR.float().square().sum(0)[:, None]


def hard_top_k(logits_BN: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return 1 for the k largest logits of each token, 0 for the others, ``[B, N]``."""
    chosen = logits_BN.detach().topk(top_k, dim=1).indices
    return torch.zeros_like(logits_BN, requires_grad=False).scatter_(1, chosen, 1.0)


def mean_error(
    part: RoutedNeurons, labels_R: np.ndarray, rows_NH: torch.Tensor, top_k: int, tokens: torch.Tensor
) -> float:
    """Return the mean squared error over ``tokens`` (int64 indices), weighted by scale; NaN without tokens."""
    device, total = part.inputs.device, 0.0
    assignment_RN = one_hot(labels_R, len(rows_NH), device)
    rows_NH = rows_NH.to(device)
    with torch.no_grad():
        for index_B in torch.split(tokens, part.inputs.batch_tokens):
            x_BH, h_BR = part.tokens(index_B)
            selection_BN = hard_top_k(x_BH @ rows_NH.T, top_k)
            total += float(part.errors(h_BR, selection_BN, assignment_RN).double().sum())
    return total / len(tokens) if len(tokens) else math.nan


def one_hot(labels_R: np.ndarray, num_experts: int, device: torch.device) -> torch.Tensor:
    """Return the one-hot matrix of labels, float32 ``[R, N]``."""
    return torch.nn.functional.one_hot(torch.from_numpy(labels_R), num_experts).float().to(device)


def first_logits(power_RN: np.ndarray, labels_R: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return float32 ``[R, N]``: assignment logits whose best balanced assignment is ``labels_R``.

    A neuron's logits are its powers captured by the experts, normalised to mean 0 and deviation 1: Adam moves all
    neurons at one pace, however strong they are. Its own expert leads by `MARGIN`.
    """
    power = torch.from_numpy(power_RN)
    logits = power - power.mean(1, keepdim=True)
    logits /= logits.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)
    own = torch.from_numpy(labels_R)[:, None]
    logits.scatter_(1, own, logits.amax(1, keepdim=True) + MARGIN)
    return logits.float().to(device)


def spread_of(logits_BN: torch.Tensor) -> torch.Tensor:
    """Return the router logits' RMS deviation from each token's mean, at least `LEAST_SPREAD`; no gradient."""
    logits = logits_BN.detach()
    spread = (logits - logits.mean(1, keepdim=True)).square().mean().sqrt()
    return spread.clamp(min=LEAST_SPREAD)


def size_of(rows: torch.Tensor) -> float:
    """Return the root mean square of a matrix's entries without the mean row; 1 if it is zero."""
    rows = rows.detach()
    return (float((rows - rows.mean(0)).square().mean().sqrt()) if len(rows) else 0.0) or 1.0


@dataclass
class Learner:
    """Trains assignment logits and router rows with Adam, by straight-through estimates.

    Forward, every neuron is in one expert (an exact balanced assignment of the logits A) and every token selects k
    experts. Backward, the slopes of L along P at that point go through the soft plan ``P = Sinkhorn(A / tau)``, and
    those along z through `soft_top_k` of the logits over ``router_temperature`` x their spread.

    L is quadratic, and hard choices are corners: the derivative there pushes every neuron out of its expert and every
    token away from its selected experts, because it ignores the error that the neuron or expert causes once it is
    gone. A slope here is that of the straight line to the next corner: the change of L if this one neuron
    (`RoutedNeurons.moving_errors`) or this one expert of a token (`RoutedNeurons.switching_errors`) moves.

    Attributes:
        part: The neurons and inputs.
        context: The context with k and the experts' width.
        settings: Rates, temperatures, steps.
        logits_RN: A, changed in place.
        rows_NH: The router's rows, changed in place.
        unit: Error that is the unit of the loss.
        generator: Generator of mini-batches, on the CPU.
        labels_R: int64, each neuron's expert.
    """

    part: RoutedNeurons
    context: LayerContext
    settings: LearningOptions
    logits_RN: torch.Tensor
    rows_NH: torch.Tensor
    unit: float
    generator: torch.Generator
    labels_R: np.ndarray
    _prices: np.ndarray | None = None
    _soft_prices: torch.Tensor | None = None
    _queue: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.logits_RN.requires_grad_()
        self.rows_NH.requires_grad_()
        rates = self.settings.lr_assignment, self.settings.lr_router * size_of(self.rows_NH)
        self._rates = rates
        groups = [{"params": [p], "lr": r} for p, r in zip((self.logits_RN, self.rows_NH), rates, strict=True)]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def run(self, tokens: torch.Tensor, first: int, last: int) -> None:
        """Run steps ``first`` .. ``last - 1`` of the schedule on mini-batches of ``tokens`` (int64 indices)."""
        settings = self.settings
        for step in range(first, last):
            done = step / max(settings.steps - 1, 1)
            tau = settings.tau_start * (settings.tau_end / settings.tau_start) ** done
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            self._optimizer.zero_grad()
            self.gradients(self._batch(tokens), tau)
            self._optimizer.step()
            if (step + 1) % settings.refresh == 0 or step + 1 == last:
                self.assign()

    def assign(self) -> None:
        """Set the labels to the best balanced assignment of the current logits."""
        cost = -self.logits_RN.detach().cpu().double().numpy()
        self.labels_R, self._prices = assign_with_prices(cost, self.context.expert_width, self._prices)

    def gradients(self, index_B: torch.Tensor, tau: float) -> float:
        """Put the gradients of the loss on these tokens into ``logits_RN.grad`` and ``rows_NH.grad``; return the loss.

        O(B R (H + N)) and O(R N (N + Sinkhorn's iterations)).
        """
        settings = self.settings
        with torch.enable_grad():
            x_BH, h_BR = self.part.tokens(index_B)
            logits_BN = x_BH @ self.rows_NH.T
            soft_BN = soft_top_k(logits_BN / self._temperature(logits_BN), self.context.top_k)
            hard_BN = hard_top_k(logits_BN, self.context.top_k)
            assignment_RN = one_hot(self.labels_R, len(self.rows_NH), h_BR.device).requires_grad_()
            selection_BN = hard_BN.clone().requires_grad_()
            loss = self.part.errors(h_BR, selection_BN, assignment_RN).mean() / self.unit
            if settings.balance:
                share_N = hard_BN.mean(0) / self.context.top_k
                loss = loss + settings.balance * len(share_N) * (share_N * selection_BN.mean(0)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            assert assignment_RN.grad is not None
            assert selection_BN.grad is not None
            each = 1 / (len(index_B) * self.unit)
            selection_BN.grad += each * self.part.switching_errors(h_BR, hard_BN, self.labels_R)
            assignment_RN.grad += each * self.part.moving_errors(h_BR, hard_BN, self.labels_R)
            soft_BN.backward(selection_BN.grad)  # type: ignore[no-untyped-call]
        plan_RN, self._soft_prices = balanced_transport(
            self.logits_RN, tau, settings.sinkhorn_iterations, self._soft_prices
        )
        self.logits_RN.grad = transport_gradient(plan_RN, assignment_RN.grad, tau)
        return float(loss.detach())

    def _temperature(self, logits_BN: torch.Tensor) -> torch.Tensor:
        return self.settings.router_temperature * spread_of(logits_BN)

    def _batch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the next tokens of a shuffled pass through all of them, ascending."""
        if not self._queue:
            shuffled = tokens[torch.randperm(len(tokens), generator=self.generator)]
            size = min(self.settings.batch, len(tokens))
            whole = shuffled[: len(shuffled) // size * size]
            self._queue = list(torch.split(whole, size))
        return self._queue.pop().sort().values
