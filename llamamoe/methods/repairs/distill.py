"""All weights of a layer's neurons, by gradient descent on the dense output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from ...errors import LlamaMoeError
from ...lazy import torch
from ...plugins import PluginOptions
from ..layer import BATCH_TOKENS, ExpertWeights, FfnWeights, LayerContext, TokenWeighting, activate, token_scales
from ..moe_layer import ConvertedFfn, dense_outputs
from ..splitters.base import Kept
from .base import Repair
from .least_squares import LeastSquares

WARM_UP = 20
"""Steps over which the step size rises: Adam's second moments mean nothing before."""


class Distill(Repair):
    """``min sum_t s_t^2 ||y_t - E(x_t)||^2`` over the gate, up and down weights of all places, the choices held fixed.

    It begins with `LeastSquares`, which finds the best down projections for the neurons there are; then the neurons
    themselves move, because those left out in a token can be stood in for only by others that become more like them.
    Adam, cosine schedule, step size ``lr`` x the root mean square of each matrix. The layer alone is distilled from
    its parent: nothing is propagated through the model, and the router stays as it is.

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
        ridge: float = Field(0.02, ge=1e-6, allow_inf_nan=False, description="Strength of the least squares.")
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
        first = LeastSquares(LeastSquares.Options(ridge=options.ridge, weighting=options.weighting))
        moe = replace(moe, weights=first.repair(moe, ffn, context))
        return _descend(moe, ffn, context, options)

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
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        optimiser = torch.optim.Adam([{"params": [w]} for w in weights], lr=options.lr, betas=(0.9, 0.98), fused=True)
        step_size = _schedule(options, inputs.num_tokens)
        for step, rows in enumerate(_minibatches(options, inputs.num_tokens, context)):
            for group, size in zip(optimiser.param_groups, sizes, strict=True):
                group["lr"] = size * step_size(step)
            x_BH = inputs.x_TH[rows].to(device, dtype)
            counts_BP = moe.place_weights(chosen_TN[rows].to(device))
            gate, up, down = (w.to(dtype) for w in weights)
            h_BP = activate(x_BH @ gate.T, moe.hidden_act).to(dtype) * (x_BH @ up.T) * counts_BP
            error_BH = (h_BP @ down.T).float() - aims_TH[rows].to(device).float()
            if scales_T is not None:
                error_BH = error_BH * scales_T[rows].to(device)[:, None]
            loss = error_BH.square().sum(1).mean()
            if not bool(loss.isfinite()):
                raise LlamaMoeError(
                    f"layer {context.layer}: the distillation's error is no longer finite at step {step}.",
                    hint="Use a smaller step (--set repair.lr=0.005) or --compute-dtype float32.",
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    gate, up, down = (w.detach().to(start.gate_PH.device) for w in weights)
    return replace(start, gate_PH=gate, up_PH=up, down_HP=down)


def _steps(options: Distill.Options, tokens: int) -> int:
    return options.epochs * max(1, tokens // options.batch)


def _schedule(options: Distill.Options, tokens: int) -> Callable[[int], float]:
    """Step number to step size: a short rise, then a half cosine to zero."""
    total = _steps(options, tokens)

    def size(step: int) -> float:
        return options.lr * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / total))

    return size


def _minibatches(options: Distill.Options, tokens: int, context: LayerContext) -> Iterator[torch.Tensor]:
    """int64 ``[batch]``: token numbers of every step, each epoch in an order of its own; what is left over rests."""
    rng = context.rng("distill")
    for _ in range(options.epochs):
        order = torch.from_numpy(rng.permutation(tokens))
        for start in range(0, max(1, tokens // options.batch) * options.batch, options.batch):
            yield order[start : start + options.batch]
