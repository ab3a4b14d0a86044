"""Fit all weights of a layer's neurons by gradient descent on the dense output."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..layer import BATCH_TOKENS, ExpertWeights, FfnWeights, LayerContext, TokenWeighting, activate, token_scales
from ..moe_layer import ConvertedFfn, dense_outputs
from ..solvers.correction import Penalty
from ..solvers.descent import BETAS, descend
from ..splitters.base import Kept
from .base import Repair
from .least_squares import LeastSquares, Ridge


class Distill(Repair):
    """``min sum_t s_t^2 ||y_t - E(x_t)||^2`` over the gate, up and down weights of all places, with fixed choices.

    It starts with `LeastSquares`, which finds the best down projections for the existing neurons; then the neurons
    themselves change, because unselected neurons can only be replaced by others that become more similar to them.
    Adam, cosine schedule, step size ``lr`` x the root mean square of each matrix. The layer alone is distilled from
    its parent: nothing is propagated through the model, and the router is unchanged.

    The places of a token's unselected experts get no gradient from it, padding stays zero.
    """

    name = "distill"
    summary = "least_squares, then gate, up and down of every neuron by gradient descent on the dense output"
    reference = "layer-wise distillation; Adam (arXiv:1412.6980)"
    keeps: ClassVar[Kept] = "nothing"

    class Options(PluginOptions):
        """Options of `Distill`."""

        epochs: int = Field(4, ge=1, le=1000, description="Sweeps over the calibration tokens.")
        lr: float = Field(
            0.02, gt=0, lt=1, description="Largest step, as a share of the root mean square of the weights."
        )
        batch: int = Field(2048, ge=1, description="Tokens per step.")
        ridge: Ridge = Field(
            0.02, description="Strength of the least squares; auto: the best on held-out tokens, layer by layer."
        )
        penalty: Penalty = Field("mean", description="Unit of that strength: mean, median or balanced.")
        weighting: TokenWeighting = Field(
            "residual", description="residual: errors count relative to the token's residual stream."
        )

    options: Options

    def repair(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> ExpertWeights:
        """See `Repair.repair`. O(epochs T P H) beside the least squares.

        Raises:
            LlamaMoeError: The error is not finite.
        """
        options = self.options
        first = LeastSquares(
            LeastSquares.Options(ridge=options.ridge, penalty=options.penalty, weighting=options.weighting)
        )
        moe = replace(moe, weights=first.repair(moe, ffn, context))
        return _descend(moe, ffn, context, options)

    def training_flops(self, places: int, hidden_size: int, tokens: int) -> int:
        """See `Plugin.training_flops`: forward, gradients of the weights, and of the activations of ``down`` alone."""
        return self.options.epochs * tokens * (6 + 8) * places * hidden_size

    @classmethod
    def working_bytes(cls, places: int, hidden_size: int) -> int:
        """See `Repair.working_bytes`: the least squares, or float32 weights, gradients and Adam's two moments."""
        descent = 4 * 5 * 3 * places * hidden_size + 4 * BATCH_TOKENS * 6 * places
        return max(LeastSquares.working_bytes(places, hidden_size), descent)


def _descend(moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext, options: Distill.Options) -> ExpertWeights:
    inputs = context.inputs
    dtype, device = inputs.compute_dtype, inputs.device
    start = moe.weights
    weights = [w.to(device, torch.float32).clone() for w in (start.gate_PH, start.up_PH, start.down_HP)]
    sizes = [float(w.square().mean().sqrt()) for w in weights]
    if not inputs.num_tokens or not all(sizes):
        return start
    aims_TH = torch.cat([y_BH.to(dtype).cpu() for y_BH in dense_outputs(inputs, ffn)])
    chosen_TN = torch.cat([moe.expert_weights(x_BH).to(dtype).cpu() for x_BH in inputs.inputs()])
    scales_T = token_scales(inputs, options.weighting)
    for weight in weights:
        weight.requires_grad_()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        x_BH = inputs.x_TH[rows].to(device, dtype)
        counts_BP = moe.place_weights(chosen_TN[rows].to(device))
        gate, up, down = (w.to(dtype) for w in weights)
        h_BP = activate(x_BH @ gate.T, moe.hidden_act).to(dtype) * (x_BH @ up.T) * counts_BP
        error_BH = (h_BP @ down.T).float() - aims_TH[rows].to(device).float()
        if scales_T is not None:
            error_BH = error_BH * scales_T[rows].to(device)[:, None]
        return error_BH.square().sum(1).mean()

    groups = [{"params": [w], "size": size, "share": options.lr} for w, size in zip(weights, sizes, strict=True)]
    descend(
        torch.optim.Adam(groups, betas=BETAS, fused=True),
        loss_of,
        inputs.num_tokens,
        context.rng("distill"),
        batch=options.batch,
        epochs=options.epochs,
        what=f"layer {context.layer}: the distillation's error",
        hint="Use a smaller step (--set repair.lr=0.005) or --compute-dtype float32.",
    )
    gate, up, down = (w.detach().to(start.gate_PH.device) for w in weights)
    return replace(start, gate_PH=gate, up_PH=up, down_HP=down)
