"""Train a linear router on given choices: a convex problem, solved by full passes over the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ...lazy import torch
from ...numerics import double_device, solve_ridge
from ..layer import LayerInputs
from .transport import top_k_threshold

ChoiceLoss = Literal["logistic", "softmax"]


@dataclass(frozen=True)
class ChoiceProblem:
    """``min_R sum_t w_t loss(R x_t, choices_t) / sum_t w_t + (decay m / 2) ||R||^2``, m the mean square of x.

    With l = R x and A the k chosen experts of a token, the loss is

    * ``logistic``: ``sum_i log(1 + exp(l_i - b)) + k b - sum_(i in A) l_i``, with the token's own threshold b where the
      probabilities ``p = sigmoid(l - b)`` sum to k; it is 0 for a certain and correct choice; gradient ``p - A``;
    * ``softmax``: ``-sum_(i in A) log softmax(l)_i``; gradient ``k softmax(l) - A``.

    Both are convex in R, and their curvature in l is at most ``curvature`` (Böhning, 1992, for the second).

    Attributes:
        inputs: The tokens.
        chosen_TN: bool ``[T, N]``, the choices to learn.
        weight_T: float32 ``[T]``, weights of the tokens to fit; 0 for those held out.
        held_out_T: float32 ``[T]``, weights of those held out.
        loss: One of the two.
        decay: Weight decay, as a share of m.
    """

    inputs: LayerInputs
    chosen_TN: torch.Tensor
    weight_T: torch.Tensor
    held_out_T: torch.Tensor
    loss: ChoiceLoss
    decay: float

    @cached_property
    def gram_HH(self) -> torch.Tensor:
        """Mean of ``x x^T`` over the tokens to fit, float64."""
        return weighted_gram(self.inputs, self.weight_T)[0]

    @property
    def strength(self) -> float:
        """Strength of the decay, ``decay m``."""
        return self.decay * float(self.gram_HH.diagonal().mean())

    @property
    def top_k(self) -> int:
        """k, 0 if there are no tokens."""
        return int(self.chosen_TN[:1].sum())

    @property
    def curvature(self) -> float:
        """Upper bound of the second derivative of a token's loss."""
        return 0.25 if self.loss == "logistic" else self.top_k / 2

    def losses(self, logits_BN: torch.Tensor, chosen_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens' losses ``[B]`` and their gradients with respect to the logits ``[B, N]``."""
        own_B = (logits_BN * chosen_BN).sum(1)
        if self.loss == "softmax":
            value_B = self.top_k * torch.logsumexp(logits_BN, 1) - own_B
            return value_B, self.top_k * logits_BN.softmax(1) - chosen_BN.float()
        threshold_B1 = top_k_threshold(logits_BN, self.top_k)
        above_BN = logits_BN - threshold_B1
        value_B = torch.nn.functional.softplus(above_BN).sum(1) + self.top_k * threshold_B1[:, 0] - own_B
        return value_B, above_BN.sigmoid() - chosen_BN.float()

    def sweep(self, rows_NH: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        """Return the fitted loss with decay, the held-out loss, and the first one's gradient. O(T N H).

        Args:
            rows_NH: float64 ``[N, H]``, on the device for float64.
        """
        inputs, device = self.inputs, rows_NH.device
        gradient_NH, fitted, held_out = torch.zeros_like(rows_NH), 0.0, 0.0
        moved = rows_NH.to(inputs.device, torch.float32)
        for part, x_BH in zip(inputs.batches(), inputs.inputs(), strict=True):
            x_BH = x_BH.float()
            value_B, slope_BN = self.losses(x_BH @ moved.T, self.chosen_TN[part].to(x_BH.device))
            weight_B = self.weight_T[part].to(x_BH.device)
            gradient_NH += ((slope_BN * weight_B[:, None]).T @ x_BH).to(device).double()
            fitted += float((value_B * weight_B).double().sum())
            held_out += float((value_B * self.held_out_T[part].to(x_BH.device)).double().sum())
        total, other = float(self.weight_T.double().sum()), float(self.held_out_T.double().sum())
        penalty = self.strength * rows_NH
        fitted = fitted / total + float((penalty * rows_NH).sum()) / 2
        return fitted, held_out / other if other else fitted, gradient_NH / total + penalty

    def solve(self, rows_NH: torch.Tensor, iterations: int, patience: int) -> tuple[torch.Tensor, list[float]]:
        """Return the rows with the least held-out loss among the iterates from ``rows_NH`` to the optimum.

        Each step minimises the quadratic bound that ``curvature`` gives, whose Hessian is the same for all steps and
        all experts: without momentum the loss cannot rise. Nesterov's momentum is reset where it points
        uphill (O'Donoghue and Candes, 2015). Deterministic.

        Args:
            rows_NH: float32 ``[N, H]`` to start from.
            iterations: Maximum number of steps, each a sweep over the tokens.
            patience: Steps without a better held-out loss after which it stops.

        Returns:
            float32 ``[N, H]`` on the CPU, and the fitted loss of every step.
        """
        device = double_device(self.inputs.device)
        here = before = rows_NH.to(device).double()
        bound_HH = self.curvature * self.gram_HH
        best, least, waited, momentum, history = here, float("inf"), 0, 1.0, []
        for _ in range(iterations):
            fitted, held_out, gradient_NH = self.sweep(here)
            history.append(fitted)
            if held_out < least:
                best, least, waited = here, held_out, 0
            else:
                waited += 1
            if waited > patience:
                break
            after = here - solve_ridge(bound_HH.clone(), gradient_NH.T, max(self.strength, 1e-30)).T
            if float((gradient_NH * (after - before)).sum()) > 0:
                momentum = 1.0
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            here = after + (momentum - 1) / following * (after - before)
            before, momentum = after, following
        return best.float().cpu(), history


def weighted_gram(
    inputs: LayerInputs, weight_T: torch.Tensor, aim_TN: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``sum w x x^T`` and ``sum w x aim^T`` over ``sum w``, float64 ``[H, H]`` and ``[H, N]``.

    Products in float32, sums over batches in float64. O(T H (H + N)).
    """
    device, hidden = double_device(inputs.device), inputs.x_TH.shape[1]
    aim_TN = weight_T.new_empty(len(weight_T), 0) if aim_TN is None else aim_TN
    gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
    cross = torch.zeros(hidden, aim_TN.shape[1], dtype=torch.float64, device=device)
    for part, x_BH in zip(inputs.batches(), inputs.inputs(), strict=True):
        x_BH = x_BH.float()
        scaled_HB = (x_BH * weight_T[part].to(x_BH.device)[:, None]).T
        gram += (scaled_HB @ x_BH).to(device)
        cross += (scaled_HB @ aim_TN[part].to(x_BH.device)).to(device)
    total = float(weight_T.double().sum()) or 1.0
    return gram / total, cross / total
