"""Measure a router against the contributions of the experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..lazy import torch
from .layer import PADDING, ExpertWeights, FfnWeights, LayerInputs, Partition
from .moe_layer import ConvertedFfn

Contribution = Literal["norm", "power"]


def contributions(
    weights: FfnWeights | ExpertWeights,
    partition: Partition,
    inputs: LayerInputs,
    *,
    kind: Contribution = "norm",
    hidden_act: str = "silu",
) -> Iterator[torch.Tensor]:
    """Yield every expert's contribution to the output, in batches float32 ``[B, N]`` on the inputs' device.

    ``"norm"``: ``||E_i(x)||^2``, computed as ``h_i^T (D_i^T D_i) h_i``: O(T P W) beside the activations.
    ``"power"``: ``sum_j h_j^2 ||down_j||^2``, which ignores how the expert's neurons add up or cancel: O(T P).

    Args:
        weights: The parent's FFN, or the places' own weights (after a repair).
        partition: The partition of neurons or places into experts.
        inputs: The tokens.
        kind: One of the two.
        hidden_act: Name of the activation, for `ExpertWeights` (`FfnWeights` have it).
    """
    shared, (num_experts, width) = len(partition.shared), partition.experts.shape
    slots = torch.from_numpy(partition.experts.ravel())
    real_R = (slots != PADDING).float().to(inputs.device)
    places = slots.clamp(min=0) if isinstance(weights, FfnWeights) else torch.arange(shared, shared + len(slots))
    down = weights.down_HF if isinstance(weights, FfnWeights) else weights.down_HP
    down_HR = down[:, places].to(inputs.device, torch.float32) * real_R
    places = places.to(inputs.device)
    if kind == "power":
        power_R = down_HR.square().sum(0)
    else:
        down_NWH = down_HR.T.reshape(num_experts, width, -1)
        gram_NWW = down_NWH @ down_NWH.transpose(1, 2)
    for h_BF in inputs.hidden(weights, hidden_act):
        h_BR = h_BF[:, places] * real_R
        if kind == "power":
            yield (h_BR.square() * power_R).reshape(-1, num_experts, width).sum(2)
        else:
            h_NBW = h_BR.reshape(-1, num_experts, width).transpose(0, 1)
            yield (torch.bmm(h_NBW, gram_NWW) * h_NBW).sum(2).clamp_(min=0).T


class OracleTally:
    """Sums over tokens that compare a router's choices with an oracle's: the k experts with the largest contribution.

    Args:
        num_experts: ``N``.
        top_k: ``k``.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.tokens, self._top_k = 0, top_k
        self._hits = self._held = self._best = self._every = self._shares = 0.0
        self._load_N = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, score_BN: torch.Tensor, chosen_BN: torch.Tensor) -> None:
        """Add tokens.

        Args:
            score_BN: Contributions, from `contributions`.
            chosen_BN: bool; the experts that the router selected.
        """
        oracle = score_BN.topk(self._top_k, dim=1)
        held_B = (score_BN * chosen_BN).double().sum(1)
        best_B = oracle.values.double().sum(1)
        self.tokens += len(score_BN)
        self._hits += float(chosen_BN.gather(1, oracle.indices).sum())
        self._held += float(held_B.sum())
        self._best += float(best_B.sum())
        self._every += float(score_BN.double().sum())
        self._shares += float(torch.where(best_B > 0, held_B / best_B, 1.0).sum())
        self._load_N += chosen_BN.sum(0).double().cpu()

    @property
    def chance(self) -> float:
        """The recall of a random choice of experts, k/N."""
        return self._top_k / len(self._load_N)

    @property
    def contributes(self) -> bool:
        """True if any expert contributed to any token."""
        return self._best > 0

    def quality(self) -> dict[str, float]:
        """Return the measures of `router_quality` over all tokens so far."""
        num_experts = len(self._load_N)
        share_N = self._load_N / self._load_N.sum()
        entropy = -float(torch.special.xlogy(share_N, share_N).sum())
        return {
            "recall_at_k": self._hits / (self.tokens * self._top_k),
            "chance_recall": self.chance,
            "captured": self._held / self._best if self.contributes else 1.0,
            "captured_by_chance": self._every * self.chance / self._best if self.contributes else 1.0,
            "captured_per_token": self._shares / self.tokens,
            "load_max_over_mean": float(share_N.max()) * num_experts,
            "entropy": entropy / float(torch.tensor(num_experts).log()) if num_experts > 1 else 1.0,
            "dead_experts": float((self._load_N == 0).sum()),
        }


def router_quality(
    moe: ConvertedFfn, ffn: FfnWeights, inputs: LayerInputs, *, kind: Contribution = "norm"
) -> dict[str, float]:
    """Compare the router's choice with an oracle's, which takes the k experts with the largest contribution.

    The contributions are those of the layer's current weights.

    Returns:
        ``recall_at_k``: mean share of the oracle's experts that the router chose;
        ``chance_recall``: the recall of a random router, k/N;
        ``captured``: contribution of the router's choices as a share of the oracle's (sums over
        tokens); ``captured_by_chance``: the same for random experts;
        ``captured_per_token``: mean of the tokens' own shares, in which no large token dominates;
        ``load_max_over_mean``: load of the most loaded expert, 1 if balanced, N/k at most;
        ``entropy``: entropy of the load, as a share of log N; 1 if balanced;
        ``dead_experts``: number of experts that no token chose.

    Raises:
        ValueError: There are no tokens.
    """
    if inputs.num_tokens == 0:
        raise ValueError("a router's quality needs at least one token")
    tally = OracleTally(moe.num_experts, moe.top_k)
    scores = contributions(moe.weights, moe.partition, inputs, kind=kind, hidden_act=moe.hidden_act)
    for x_BH, score_BN in zip(inputs.inputs(), scores, strict=True):
        tally.add(score_BN, moe.expert_weights(x_BH) != 0)
    return tally.quality()
