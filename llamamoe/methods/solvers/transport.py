"""Entropic relaxations of a balanced assignment of neurons to experts, and of a token's k best experts.

Both are linear programmes whose solutions are corners; an entropy term makes them smooth, by an amount that a
temperature sets. ``R`` neurons, ``N`` experts, ``B`` tokens. Only `soft_top_k` is tracked by autograd.
"""

from __future__ import annotations

import math

from ...lazy import torch
from ...numerics import double_device

LEAST_CURVATURE = 1e-6
"""Regularisation of `transport_gradient`, relative to a column sum: the system is singular for nearly hard plans."""
EXCESS = 100
"""Tolerance of the sum of a token's probabilities, in rounding errors of k."""
MOST_STEPS = 60
"""Maximum steps in search of a token's threshold; rounding may keep the sum from converging further."""


def balanced_transport(
    logits_RN: torch.Tensor,
    temperature: float,
    iterations: int,
    prices_N: torch.Tensor | None = None,
    sizes_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the plan P >= 0 with the largest ``<P, A> + temperature entropy(P)``.

    Its rows sum to 1, its columns to R/N or ``sizes_N``.

    Sinkhorn's algorithm on logarithms: ``P_jc = exp((A_jc - p_c) / temperature) / Z_j``, with prices p adjusted until
    the columns fit. Rows are exact, columns as exact as the iterations make them. O(R N) each.

    Reference: Cuturi, Sinkhorn distances (NeurIPS 2013); DOT-MoE (arXiv:2606.01666) learns its assignment this way.

    Args:
        logits_RN: A, the gain of each neuron in each expert.
        temperature: > 0.
        iterations: At least 1.
        prices_N: Initial prices, such as those of similar logits.
        sizes_N: Sums of the columns, above 0, R together; None for equal ones.

    Returns:
        P ``[R, N]`` and the prices ``[N]``.
    """
    scaled_RN = logits_RN.detach() / temperature
    potential_N = scaled_RN.new_zeros(scaled_RN.shape[1]) if prices_N is None else -prices_N / temperature
    even = scaled_RN.new_full(scaled_RN.shape[1:], max(len(scaled_RN), 1) / scaled_RN.shape[1])
    log_size_N = (even if sizes_N is None else sizes_N).log()
    for _ in range(iterations):
        row_R1 = torch.logsumexp(scaled_RN + potential_N, dim=1, keepdim=True)
        potential_N = log_size_N - torch.logsumexp(scaled_RN - row_R1, dim=0)
    return (scaled_RN + potential_N).softmax(dim=1), -potential_N * temperature


def transport_gradient(plan_RN: torch.Tensor, gradient_RN: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return ``dL/dA`` from ``dL/dP`` for a converged plan of `balanced_transport`. O(R N^2).

    With ``P = exp((A + f + g) / temperature)`` and fixed row and column sums, the potentials f and g depend on a
    change of A by a linear system. With f eliminated it has N unknowns e; s are the column sums, G is dL/dP and
    ``q_j = sum_c P_jc G_jc``:

        dL/dA = P * (G - q_j + (P e)_j - e_c) / temperature,    (diag(s) - P^T P) e = sum_j P_jc (G_jc - q_j).

    This is the derivative of the converged plan, whatever the number of iterations that found it, and keeps none of
    them in memory.
    """
    device = double_device(plan_RN.device)
    plan, gradient = plan_RN.to(device).double(), gradient_RN.to(device).double()
    own_RN = plan * (gradient - (plan * gradient).sum(1, keepdim=True))
    size_N = plan.sum(0)
    system_NN = torch.diag(size_N * (1 + LEAST_CURVATURE)) - plan.T @ plan
    # e is known up to a constant, which cancels below; this fixes it.
    system_NN += size_N.mean() / len(size_N)
    e_N = torch.linalg.solve(system_NN, own_RN.sum(0))
    out_RN = (own_RN + plan * ((plan @ e_N)[:, None] - e_N)) / temperature
    out: torch.Tensor = out_RN.to(plan_RN)
    return out


def top_k_threshold(logits_BN: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return ``[B, 1]``: b with ``sum_i sigmoid(l_i - b) = k`` for each token, 0 < k < N.

    Newton's method, with bisection where a step would leave the interval that contains b: most batches take
    five to ten steps of O(B N).
    """
    logits_BN = logits_BN.detach()
    num_experts = logits_BN.shape[1]
    if not 0 < top_k < num_experts:
        raise ValueError(f"no threshold selects {top_k} of {num_experts}")
    reach = abs(math.log(top_k / (num_experts - top_k)))
    low_B1 = logits_BN.amin(1, keepdim=True) - reach
    high_B1 = logits_BN.amax(1, keepdim=True) + reach
    near = EXCESS * top_k * torch.finfo(logits_BN.dtype).eps
    here_B1 = (low_B1 + high_B1) / 2
    for _ in range(MOST_STEPS):
        share_BN = (logits_BN - here_B1).sigmoid()
        excess_B1 = share_BN.sum(1, keepdim=True) - top_k
        if bool((excess_B1.abs() <= near).all()):
            break
        low_B1 = torch.where(excess_B1 > 0, here_B1, low_B1)
        high_B1 = torch.where(excess_B1 > 0, high_B1, here_B1)
        there_B1 = here_B1 + excess_B1 / (share_BN * (1 - share_BN)).sum(1, keepdim=True).clamp(min=1e-30)
        inside_B1 = (there_B1 > low_B1) & (there_B1 < high_B1)
        here_B1 = torch.where(inside_B1, there_B1, (low_B1 + high_B1) / 2)
    return here_B1


def soft_top_k(logits_BN: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return ``sigmoid(l - b)`` ``[B, N]``, with b such that each token's sum is k; differentiable, b included.

    It is the z in [0, 1]^N of sum k with the largest ``<z, l> + sum_i entropy(z_i)``; the k largest logits get the
    largest values. Ones if k is N.
    """
    if top_k >= logits_BN.shape[1]:
        return torch.ones_like(logits_BN)
    threshold_B1 = top_k_threshold(logits_BN, top_k)
    near_BN = (logits_BN - threshold_B1).sigmoid()
    slope_BN = (near_BN * (1 - near_BN)).detach()
    # One Newton step from the solution changes nothing and carries the threshold's derivative.
    excess_B1 = near_BN.sum(1, keepdim=True) - top_k
    moving_B1 = threshold_B1 + excess_B1 / slope_BN.sum(1, keepdim=True).clamp(min=1e-30)
    return (logits_BN - moving_B1).sigmoid()
