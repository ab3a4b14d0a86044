"""Train one layer: its native FFN on the outputs of the parent's FFN for the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import LlamaMoeError
from ..lazy import np, torch
from ..methods.layer import LayerInputs, token_scales
from ..methods.solvers.descent import BETAS, descend
from ..numerics import wide
from ..training.losses import LOSSES, LossContext
from ..training.router_start import logit_std, soften
from ..training.routing import RouterTap, Routing
from .block import NativeFfn
from .recipe import HealRecipe


@dataclass(frozen=True)
class LayerTask:
    """The training data and settings of one layer.

    Attributes:
        inputs: Inputs of the FFN, sequence by sequence.
        aims_TH: Outputs of the parent's FFN for them, on the CPU.
        num_trained: Number of leading tokens to train on; the rest is held out.
        recipe: Training settings.
        layer: Index of the layer.
    """

    inputs: LayerInputs
    aims_TH: torch.Tensor
    num_trained: int
    recipe: HealRecipe
    layer: int

    @property
    def trained(self) -> slice:
        """The tokens that are trained on."""
        return slice(0, self.num_trained)

    @property
    def held_out(self) -> slice:
        """The held-out tokens."""
        return slice(self.num_trained, self.inputs.num_tokens)

    def scales(self) -> torch.Tensor:
        """Return the factor of each token's error, float32 ``[T]``."""
        found = token_scales(self.inputs, self.recipe.weighting)
        return torch.ones(self.inputs.num_tokens) if found is None else found

    def x(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return inputs ``[B, H]`` on the device, in the compute dtype."""
        return self.inputs.x_TH[rows].to(self.inputs.device, self.inputs.compute_dtype)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a generator that depends on seed, layer and purpose only."""
        return np.random.default_rng([self.recipe.seed, self.layer, *purpose.encode()])


def layer_error(ffn: NativeFfn, task: LayerTask, part: slice) -> float:
    """Return ``||y - E(x)|| / ||y||`` over a part of the tokens, weighted by scale; NaN if a value is not finite."""
    missed, whole = 0.0, 0.0
    scales_T, step = task.scales(), task.inputs.batch_tokens
    with torch.no_grad():
        for start in range(part.start, part.stop, step):
            rows = slice(start, min(start + step, part.stop))
            scale_B1 = scales_T[rows, None].to(task.inputs.device)
            aim_BH = task.aims_TH[rows].to(task.inputs.device).float() * scale_B1
            error_BH = aim_BH - ffn.outputs(task.x(rows)).float() * scale_B1
            missed += float(wide(error_BH).square().sum())
            whole += float(wide(aim_BH).square().sum())
    return math.sqrt(missed / whole) if whole else math.sqrt(missed)


def start_router(ffn: NativeFfn, task: LayerTask) -> dict[str, Any]:
    """Scale the router so that its logits get the recipe's standard deviation; its ranking is kept.

    A router that cannot be scaled (it selects by more than its logits, or its weights do not sum to one and are not hard)
    is left unchanged; one of zeros gets random rows, because it has no ranking to keep.
    """
    facts: dict[str, Any] = {}
    rows_NH = ffn.moe.router_NH
    with torch.no_grad():
        if not bool(rows_NH.any()):
            rows = torch.from_numpy(task.rng("router").standard_normal(tuple(rows_NH.shape)))
            rows_NH.copy_(rows)
            facts["router_drawn"] = True
        std = _logit_std(ffn, task)
    if not (std > 0 and math.isfinite(std)):
        raise LlamaMoeError(
            f"layer {task.layer}: the spread of the router's logits on the text is {std}, so it cannot be trained.",
            hint="Leave routers as they are: --set router=frozen.",
        )
    if ffn.scalable:
        factor = soften([ffn.moe], [std], task.recipe.router_std)[0].factor
        facts |= {"router_std_before": std, "router_factor": factor}
    return facts


def _logit_std(ffn: NativeFfn, task: LayerTask) -> float:
    total, count, step = 0.0, task.num_trained, task.inputs.batch_tokens
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        total += logit_std(ffn.logits(task.x(rows))) * (rows.stop - rows.start)
    return total / count


def train_layer(ffn: NativeFfn, task: LayerTask) -> None:
    """Train the FFN in place on the first `LayerTask.num_trained` tokens. O(epochs T) forward and backward passes.

    Raises:
        LlamaMoeError: The error is no longer finite.
    """
    recipe = task.recipe
    if recipe.competitive_epochs:
        rows = {"router": ffn.moe.router_NH}
        _descend(_Competitive(ffn, task), rows, task, recipe.competitive_epochs, ffn.moe.router_NH)
    trained = ffn.trained(router=recipe.router == "trained")
    _descend(_Joint(ffn, task), trained, task, recipe.epochs, ffn.moe.router_NH)


@dataclass
class _Joint:
    """The squared error relative to the mean of ``||y||^2``, and losses on the routing with their coefficients."""

    ffn: NativeFfn
    task: LayerTask
    name: str = "joint"
    scales_T: torch.Tensor = field(init=False)
    power: float = field(init=False)

    def __post_init__(self) -> None:
        self.scales_T = self.task.scales()
        part = self.task.trained
        step, total = self.task.inputs.batch_tokens, 0.0
        for start in range(part.start, part.stop, step):
            rows = slice(start, min(start + step, part.stop))
            weighted_BH = self.task.aims_TH[rows].float() * self.scales_T[rows, None]
            total += float(wide(weighted_BH).square().sum())
        self.power = total / self.task.num_trained or 1.0
        self.losses = [LOSSES.get(n)(LOSSES.get(n).Options(coefficient=c)) for n, c in self.task.recipe.losses.items()]
        self.context = LossContext()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        device = self.task.inputs.device
        tap = RouterTap([self.ffn.moe])
        try:
            with tap.armed() as routings:
                out_BH = self.ffn.outputs(self.task.x(rows))
        finally:
            tap.close()
        error_BH = out_BH.float() - self.task.aims_TH[rows].to(device).float()
        error_BH = error_BH * self.scales_T[rows, None].to(device)
        loss = error_BH.square().sum(1).mean() / self.power
        for term in self.losses:
            value = term.loss(routings, self.context)
            loss = loss + term.options.coefficient * (value / len(rows) if term.linear else value)
        return loss


@dataclass
class _Competitive:
    """The likelihood of Jacobs et al. (1991), in which experts compete for tokens; for the router alone."""

    ffn: NativeFfn
    task: LayerTask
    name: str = "competitive"

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        x_BH = self.task.x(rows)
        with torch.no_grad():
            aim_BH = self.task.aims_TH[rows].to(x_BH.device, x_BH.dtype) - self.ffn.shared_outputs(x_BH)
            aim_BH *= self.ffn.scale
        logits, weights, indices = self.ffn.moe.decisions(self.ffn.moe.router(x_BH))
        routing = Routing(self.ffn.moe, logits, weights, indices, inputs_TH=x_BH)
        loss = LOSSES.get("competitive")()
        return loss.loss([routing], LossContext(targets=lambda _: aim_BH)) / len(rows)


def _descend(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
    task: LayerTask,
    epochs: int,
    router: torch.nn.Parameter,
) -> None:
    """Run Adam with steps that are a share of each parameter's root mean square, rising, then falling to zero."""
    recipe, groups = task.recipe, []
    for parameter in parameters.values():
        size = float(wide(parameter.detach()).square().mean().sqrt())
        share = recipe.router_lr if parameter is router else recipe.lr
        groups.append({"params": [parameter], "size": 1.0, "share": size * share})
        parameter.requires_grad_()
    descend(
        torch.optim.Adam(groups, betas=BETAS, fused=task.inputs.device.type in ("cpu", "cuda")),
        loss_of,
        task.num_trained,
        task.rng("order"),
        batch=recipe.batch,
        epochs=epochs,
        what=f"layer {task.layer}: the error",
        hint="Use smaller steps (--set lr=0.005 --set router_lr=0.005) or --compute-dtype float32.",
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
