"""Train a linear router on the choices of experts that lower the output error most."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...lazy import torch
from ...numerics import check_finite, solve_ridge
from ...plugins import PluginOptions
from ..layer import ExpertWeights, FfnWeights, LayerContext, LayerInputs, Partition, TokenWeighting, token_scales
from ..moe_layer import ConvertedFfn, dense_outputs
from ..solvers.choice_loss import ChoiceLoss, ChoiceProblem, weighted_gram
from ..solvers.greedy_choices import Choices, best_choices
from ..solvers.normal_equations import held_out_tokens
from ..solvers.router_regression import centred, log_contribution
from .base import Router


class Distilled(Router):
    """A router that learns from a teacher with all experts' outputs which k of them each token should use.

    The teacher starts with ``r = y - shared neurons`` and k times takes the expert i that lowers ``||r||^2`` most when
    ``c E_i`` is subtracted from r: `greedy_choices`. It is not an expert's size that counts (as for
    `Ridge` and the control `Oracle`), but its contribution to the remaining error.

    The rows minimise a convex loss of those choices (`ChoiceProblem`), starting from the ridge regression of the
    experts' log contributions; a fifth of the tokens is held out to stop early. In the end the output error on these
    tokens decides between the distilled rows and those of the ridge regression (fitted without them); if the latter
    win, they are fitted once more to all tokens.

    For the first router the experts are the parent's neurons with c = 1 (rescale ``unit``); `refit` takes the repaired
    weights and the layer's own c.

    Original to this project.
    """

    name = "distilled"
    summary = (
        "logistic regression on the choices of experts that lower the output error most (greedy, all outputs known)"
    )
    needs = "activations"

    class Options(PluginOptions):
        """Options of `Distilled`."""

        loss: ChoiceLoss = Field(
            "logistic",
            description="logistic: each expert, threshold by token such that k are chosen; softmax: listwise.",
        )
        importance: Literal["equal", "gain"] = Field(
            "equal", description="Weights of tokens in the loss; gain: by how much their best experts lower the error."
        )
        decay: float = Field(
            1e-4, ge=1e-9, allow_inf_nan=False, description="Weight decay, as a share of the mean square of the inputs."
        )
        iterations: int = Field(60, ge=1, description="Maximum number of sweeps over the tokens' inputs.")
        patience: int = Field(5, ge=0, description="Sweeps without a lower held-out loss after which it stops.")
        ridge: float = Field(
            1e-3, ge=1e-9, allow_inf_nan=False, description="Strength of the regression it starts from."
        )
        floor: float = Field(
            1e-2, gt=0, allow_inf_nan=False, description="Added under that regression's logarithm, see ridge."
        )
        weighting: TokenWeighting = Field(
            "residual", description="residual: errors and gains count relative to the token's residual stream."
        )

    options: Options

    def rows(self, ffn: FfnWeights, partition: Partition, context: LayerContext) -> torch.Tensor:
        """See `Router.rows`.

        O(T (N^2 H + F H)) for the choices, O(T H^2) for sums of the inputs, O(T N H) for each iteration.

        Raises:
            LlamaMoeError: An activation is NaN or infinite.
        """
        num_experts = context.num_experts
        moe = ConvertedFfn(
            weights=ExpertWeights.of_parent(ffn, partition),
            partition=partition,
            router_NH=torch.zeros(num_experts, ffn.hidden_size),
            top_k=context.top_k,
            scale="hard",
            weighting="softmax",
            factor=float(num_experts),
            hidden_act=ffn.hidden_act,
        )
        return self.refit(moe, ffn, context)

    def refit(self, moe: ConvertedFfn, ffn: FfnWeights, context: LayerContext) -> torch.Tensor:
        """See `Router.refit`: from the outputs of the repaired experts."""
        inputs = context.inputs
        choices = best_choices(moe, ffn, inputs)
        check_finite(context.layer, choices.norm_TN.sum(), choices.gain_T.sum())
        aim_TN = centred(log_contribution(choices.norm_TN, self.options.floor))
        held_out_T = held_out_tokens(inputs.num_tokens).float()
        if not held_out_T.any() or moe.top_k >= moe.num_experts:
            return self._ridge(inputs, torch.ones(inputs.num_tokens), aim_TN)
        first = self._ridge(inputs, 1 - held_out_T, aim_TN)
        learned = self._problem(choices, held_out_T, inputs).solve(
            first, self.options.iterations, self.options.patience
        )
        candidates = [replace(moe, router_NH=rows_NH) for rows_NH in (first, learned[0])]
        before, after = held_out_errors(candidates, ffn, inputs, held_out_T.bool(), self.options.weighting)
        return learned[0] if after < before else self._ridge(inputs, torch.ones(inputs.num_tokens), aim_TN)

    def _problem(self, choices: Choices, held_out_T: torch.Tensor, inputs: LayerInputs) -> ChoiceProblem:
        weight_T = held_out_T.new_ones(len(held_out_T))
        if self.options.importance == "gain":
            scales_T = token_scales(inputs, self.options.weighting)
            weight_T = choices.gain_T.clamp(min=0) * (1.0 if scales_T is None else scales_T.square())
            # without any gain, all choices are equally good
            weight_T = weight_T if float((weight_T * (1 - held_out_T)).sum()) > 0 else 0 * weight_T + 1
        options = self.options
        return ChoiceProblem(
            inputs, choices.chosen_TN, weight_T * (1 - held_out_T), weight_T * held_out_T, options.loss, options.decay
        )

    def _ridge(self, inputs: LayerInputs, weight_T: torch.Tensor, aim_TN: torch.Tensor) -> torch.Tensor:
        """Return float32 ``[N, H]`` on the CPU: ridge regression of the targets, as in `Ridge`."""
        gram_HH, cross_HN = weighted_gram(inputs, weight_T, aim_TN)
        strength = self.options.ridge * float(gram_HH.diagonal().mean())
        if strength == 0:
            return torch.zeros(aim_TN.shape[1], inputs.x_TH.shape[1])
        return solve_ridge(gram_HH, cross_HN, strength).T.float().cpu()


def held_out_errors(
    candidates: list[ConvertedFfn],
    ffn: FfnWeights,
    inputs: LayerInputs,
    held_out_T: torch.Tensor,
    weighting: TokenWeighting,
) -> list[float]:
    """Return ``sum_t s_t^2 ||y_t - y~_t||^2`` over the held-out tokens (bool ``[T]``), for each candidate."""
    errors = [0.0] * len(candidates)
    scales_T = token_scales(inputs, weighting)
    for part in inputs.batches():
        rows = held_out_T[part].nonzero().flatten() + part.start
        some = replace(
            inputs,
            x_TH=inputs.x_TH[rows],
            residual_scale_T=inputs.residual_scale_T[rows],
            gradients_TH=None,
            clusters_T=None,
        )
        for i, moe in enumerate(candidates):
            for y_BH, other_BH in zip(dense_outputs(some, ffn), moe.outputs(some), strict=True):
                error_B = (y_BH - other_BH).double().square().sum(1)
                scale_B = 1.0 if scales_T is None else scales_T[rows].to(error_B.device).double().square()
                errors[i] += float((error_B * scale_B).sum())
    return errors
