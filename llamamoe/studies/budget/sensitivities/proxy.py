"""A cheap proxy: the size of the FFN's output relative to the residual stream, times the power of weak neurons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ....calibration.residual import next_normed
from ....calibration.walk import Walk, cast_ffn, read_ffn
from ....errors import LlamaMoeError
from ....lazy import np, torch
from ....methods.layer import LayerInputs
from ....progress import Progress
from .base import Sensitivity, Task, pass_flops
from .curves import Curves

STEPS = 32
"""Number of steps of the curve: shares 1/32, 2/32, ... 31/32."""


class Proxy(Sensitivity):
    """``s_l(b) = mean_t(||y_t||^2 w_t) * (lost power at b) / (power of all neurons)``, from one dense pass.

    y is what the FFN adds to the residual stream (its multiplier included), r the stream before it, and
    ``w_t = 1 / (||r_t + y_t||^2 + H eps)`` the squared divisor of the next RMSNorm, so that the first factor
    is the share of the stream written by the layer, at most about 1. The power of neuron j is
    ``sum_t w_t h_tj^2 ||down_:j||^2``; lost at share b is the power of the F - round(b F) weakest neurons, as if they
    were removed for every token without router and repair, whatever the recipe's method. The product is a
    relative squared error in the residual stream right after the layer: the effect on later layers is ignored.
    """

    name = "proxy"
    summary = "one dense pass: FFN's output beside the residual stream, times the power of its weakest neurons"
    reference = "original; the power of a neuron after FLAP (arXiv:2312.11983)"
    needs = "activations"
    unit = "relative squared error of the residual stream"
    converts = False

    def measure(self, task: Task) -> Curves:
        """See `Sensitivity.measure`. O(T F H) a layer, as a forward pass."""
        model = task.plans[0].model
        count, size = model.spec.num_layers, model.spec.intermediate_size
        shares = np.arange(1, STEPS) / STEPS
        kept = np.round(shares * size).astype(int)
        damage = np.empty((len(shares), count))
        walk = task.walk(task.text)
        for layer in range(count):
            sweep = _Sweep(walk, walk.enter(layer), layer, task.weights_dtype)
            walk.leave(layer, sweep.outputs())
            power = np.sort(sweep.power_F.numpy())
            lost = np.concatenate([[0.0], np.cumsum(power)])[size - kept] / max(power.sum(), 1e-300)
            damage[:, layer] = sweep.written / task.text.num_tokens * lost
            if not np.isfinite(damage[:, layer]).all():
                raise LlamaMoeError(f"layer {layer}: NaN or infinite activations on the calibration text.")
            task.progress(Progress("sensitivity", layer + 1, count, "layer"))
        return Curves(shares, damage)

    def flops(self, task: Task) -> int:
        """See `Sensitivity.flops`."""
        plan = task.plans[0]
        return plan.model.spec.num_layers * task.text.num_tokens * pass_flops(plan)


@dataclass
class _Sweep:
    """One pass over a layer's tokens that yields the dense outputs and sums the terms of the proxy.

    Attributes:
        power_F: float64 ``[F]``, ``sum_t w_t h_tj^2 ||down_:j||^2``; complete once `outputs` is exhausted.
        written: ``sum_t w_t ||y_t||^2``.
    """

    walk: Walk
    inputs: LayerInputs
    layer: int
    dtype: torch.dtype
    power_F: torch.Tensor = field(init=False)
    written: float = 0.0

    def outputs(self) -> Iterator[torch.Tensor]:
        """Yield the dense FFN's outputs for `Walk.leave`, which adds a batch only after its sums were taken."""
        spec, inputs = self.walk.model.spec, self.inputs
        ffn = cast_ffn(read_ffn(self.walk.model, self.layer), self.dtype)
        residual_TH = self.walk.buffers[(self.layer + 1) % 2].flatten(0, 1)
        down = ffn.down_HF.to(inputs.device, inputs.compute_dtype)
        squares_F = torch.zeros(ffn.intermediate_size, dtype=torch.float64)
        for part, h_BF in zip(inputs.batches(), inputs.hidden(ffn), strict=True):
            y_BH = (h_BF.to(inputs.compute_dtype) @ down.T).float()
            added_BH = y_BH * spec.residual_multiplier
            after_B = next_normed(spec, residual_TH[part].to(inputs.device), y_BH).double().square().sum(-1)
            weight_B = 1 / (after_B + spec.hidden_size * spec.rms_norm_eps)
            self.written += float((added_BH.double().square().sum(-1) * weight_B).sum())
            squares_F += (h_BF.square().T @ weight_B.float()).double().cpu()
            yield y_BH
        self.power_F = squares_F * ffn.down_HF.float().square().sum(0).double()
