"""A converted layer as a function in plain torch, equal to what transformers will compute from the files.

It is used by the calibration walk (a converted layer feeds the next), repair, diagnostics and simulated studies.
Tests compare it with the written file in transformers' own classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from ..architectures.moe_layout import RouterWeighting, router_scores, weight
from ..lazy import torch
from .layer import ExpertWeights, FfnWeights, LayerInputs, Partition


@dataclass(frozen=True)
class ConvertedFfn:
    """Shared neurons, routed experts and router of one layer.

    Attributes:
        weights: Weights of every place, in the parent's units.
        partition: The partition of the places.
        router_NH: float32 rows; for a soft router scaled as stored.
        top_k: Experts per token.
        scale: ``"hard"``: selected experts get equal weights; ``"soft"``: weights from the logits.
        weighting: Normalisation of the target's router.
        factor: Factor of the router's weights (baked and configured ones together).
        hidden_act: Name of the activation.
        bias_N: float32, added to the scores for the selection only; None for none.
    """

    weights: ExpertWeights
    partition: Partition
    router_NH: torch.Tensor
    top_k: int
    scale: Literal["hard", "soft"]
    weighting: RouterWeighting
    factor: float
    hidden_act: str = "silu"
    bias_N: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """``N``, the number of routed experts."""
        return len(self.partition.experts)

    @property
    def coefficient(self) -> float:
        """``c``, the factor of each selected expert under a hard router; 0 if there are no experts."""
        if not self.num_experts:
            return 0.0
        return self.factor * weight(self.weighting, self.num_experts, self.top_k)

    def expert_weights(self, x_BH: torch.Tensor, logits_BN: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of every expert for each token, float32 ``[B, N]``, 0 if it is not selected.

        Args:
            x_BH: Inputs of the FFN, any dtype.
            logits_BN: Logits that replace the router's (an oracle's, for diagnosis).
        """
        if not self.num_experts:
            return x_BH.new_zeros(len(x_BH), 0, dtype=torch.float32)
        logits = x_BH.float() @ self.router_NH.to(x_BH.device).T if logits_BN is None else logits_BN.float()
        return routed_weights(logits, self.top_k, self.scale, self.weighting, self.factor, self.bias_N)

    def place_weights(self, weights_BN: torch.Tensor) -> torch.Tensor:
        """Return float32 ``[B, P]``: the expert's weight for each of its places, 1 for shared ones."""
        shared, width = len(self.partition.shared), self.partition.experts.shape[1]
        ones = weights_BN.new_ones(weights_BN.shape[0], shared)
        return torch.cat([ones, weights_BN.repeat_interleave(width, dim=1)], dim=1)

    def weighted_hidden(self, inputs: LayerInputs) -> Iterator[torch.Tensor]:
        """Yield ``h~``, each place's activation times its weight, in batches float32 ``[B, P]`` on the inputs' device."""
        hidden = inputs.hidden(self.weights, self.hidden_act)
        for x_BH, h_BP in zip(inputs.inputs(), hidden, strict=True):
            # in place, because the generators of several candidates hold their activations at a time
            yield h_BP.mul_(self.place_weights(self.expert_weights(x_BH)))

    def outputs(self, inputs: LayerInputs) -> Iterator[torch.Tensor]:
        """Yield the layer's outputs in batches float32 ``[B, H]`` on the inputs' device. O(T P H)."""
        down = self.weights.down_HP.to(inputs.device, inputs.compute_dtype)
        for h_BP in self.weighted_hidden(inputs):
            yield (h_BP.to(inputs.compute_dtype) @ down.T).float()


def routed_weights(
    logits_BN: torch.Tensor,
    top_k: int,
    scale: Literal["hard", "soft"],
    weighting: RouterWeighting,
    factor: float,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weight of every expert for each token, float32 ``[B, N]``; see `ConvertedFfn` for the arguments."""
    ranked_BN = logits_BN if bias_N is None else router_scores(logits_BN, weighting) + bias_N.to(logits_BN.device)
    indices = ranked_BN.topk(top_k, dim=-1).indices
    top_Bk = logits_BN.gather(-1, indices)
    if scale == "hard":
        values = torch.full_like(top_Bk, factor * weight(weighting, logits_BN.shape[1], top_k))
    elif weighting == "renormalised":
        values = top_Bk.softmax(-1) * factor
    elif weighting == "softmax":
        values = logits_BN.softmax(-1).gather(-1, indices) * factor
    else:
        values = top_Bk.sigmoid()
        if weighting == "sigmoid_renormalised":
            values = values / values.sum(-1, keepdim=True)
        values = values * factor
    return torch.zeros_like(logits_BN).scatter_(-1, indices, values)


@dataclass(frozen=True)
class MixtureFfn(FfnWeights):
    """The neurons of all routed experts of a mixture, expert by expert, which its router weighs.

    Methods that take a dense FFN fit a layer to the mixture's output in the same way.

    Attributes:
        moe: The mixture, without its shared expert.
    """

    moe: ConvertedFfn = field(kw_only=True)

    @classmethod
    def of(cls, moe: ConvertedFfn, norm_H: torch.Tensor) -> MixtureFfn:
        """Return the neurons of a mixture; see `FfnWeights` for the norm."""
        weights = moe.weights
        return cls(weights.gate_PH, weights.up_PH, weights.down_HP, norm_H, moe.hidden_act, moe=moe)

    def expert(self, index: int) -> FfnWeights:
        """Return the neurons of one expert."""
        width = self.moe.partition.experts.shape[1]
        part = slice(index * width, (index + 1) * width)
        return FfnWeights(self.gate_FH[part], self.up_FH[part], self.down_HF[:, part], self.norm_H, self.hidden_act)


def dense_outputs(inputs: LayerInputs, ffn: FfnWeights) -> Iterator[torch.Tensor]:
    """Yield the parent's outputs in batches float32 ``[B, H]`` on the inputs' device."""
    if isinstance(ffn, MixtureFfn):
        yield from ffn.moe.outputs(inputs)
        return
    down = ffn.down_HF.to(inputs.device, inputs.compute_dtype)
    for h_BF in inputs.hidden(ffn):
        yield (h_BF.to(inputs.compute_dtype) @ down.T).float()


def parity_before_repair(
    moe: ConvertedFfn, ffn: FfnWeights, inputs: LayerInputs, parity_factor: float = 1.0, *, batches: int = 2
) -> float:
    """Return the layer's error with all experts selected, before repair: max abs difference / max abs output.

    The layer is run with the parent's own neurons in its places, whatever weights it has, and with equal router
    weights. The first tokens of the calibration text suffice: a missing or repeated neuron affects all of them.

    Args:
        moe: The layer, of which partition, target's factors and activation matter.
        ffn: The dense layer.
        inputs: Calibration inputs.
        parity_factor: Factor of the routed sum (see `Combine.parity_factor`).
        batches: Number of batches that are compared.
    """
    everyone = replace(
        moe,
        weights=ExpertWeights.of_parent(ffn, moe.partition),
        router_NH=moe.router_NH.new_zeros(moe.router_NH.shape),
        top_k=moe.num_experts,
        scale="hard",
        factor=moe.factor * parity_factor,
    )
    inputs = replace(inputs, compute_dtype=torch.float32)
    pairs = islice(zip(dense_outputs(inputs, ffn), everyone.outputs(inputs), strict=True), batches)
    values = [(float((want - have).abs().max()), float(want.abs().max())) for want, have in pairs]
    if any(math.isnan(difference) for difference, _ in values):
        return math.inf
    worst, largest = max(difference for difference, _ in values), max(size for _, size in values)
    return worst / largest if largest else worst
