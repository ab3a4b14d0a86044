"""AdamW on each rank's own shards, by torch's fused step, with moments and weights in bfloat16 if asked for.

Every number's step depends on its own weight, gradient and moments alone, so shards need no communication, and shards
over different meshes can be in one call. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from .routing import at_least_float32

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LOW_BITS = 16
"""The bits of a float32 number that bfloat16 lacks."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard, in the same memory; an ordinary tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def round_stochastically(values: torch.Tensor, out: torch.Tensor, generator: torch.Generator) -> None:
    """Round float32 to one of the two neighbours in bfloat16, each with the probability that keeps the mean.

    Args:
        values: float32.
        out: bfloat16 of the same shape.
        generator: Draws 16 bits for each number.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << _LOW_BITS, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    out.copy_(noise.add_(bits).bitwise_and_(-1 << _LOW_BITS).view(torch.float32))


class ShardAdamW(torch.optim.AdamW):
    """torch's AdamW on local shards."""

    def _init_group(self, group: Any, *lists: Any) -> bool:
        """Collect a group's tensors as torch does, then replace them by their shards."""
        base: Any = super()
        is_complex: bool = base._init_group(group, *lists)
        for tensors in lists[:-1]:
            tensors[:] = [local(each) for each in tensors]
        return is_complex


class CompactAdamW(torch.optim.AdamW):
    """AdamW on local shards whose moments, and weights, may be stored in bfloat16.

    A step computes in float32, one parameter at a time, and rounds stochastically, so that steps far below the spacing of
    bfloat16 add up. The draws depend on seed and step alone: replicas stay equal, and a resumed run is the same.

    Args:
        groups: Groups of parameters, by name or not.
        moments: Dtype of the moments; None: that of each parameter.
        seed: Seed of the rounding.
        options: Options of `torch.optim.AdamW`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, moments: torch.dtype | None = None, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self._moments, self._seed = moments, seed
        self._done: int | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step, as `torch.optim.AdamW` does."""
        loss = None if closure is None else closure()
        if self._done is None:  # of a run that was resumed
            self._done = max((int(each["step"]) for each in self.state.values() if "step" in each), default=0)
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    device = parameter.device
                    if device not in generators:
                        generators[device] = torch.Generator(device).manual_seed((self._seed << 31) + self._done)
                    self._step_one(parameter, group, generators[device])
        self._done += 1
        return loss

    def _step_one(self, parameter: torch.Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self._state_of(parameter, group)
        stored = [local(each) for each in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        weight, mean, square = wide = [at_least_float32(each) for each in stored]
        assert parameter.grad is not None
        gradient = local(parameter.grad).to(weight.dtype)
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [mean], [square], [], [state["step"]],
            foreach=False, fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        _store(wide, stored, generator)

    def _state_of(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            device = parameter.device if group["fused"] or group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in _MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=self._moments)
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        """Load as torch does, which casts moments to the parameter's dtype, and cast them back: both are exact."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in _MOMENTS if self._moments is not None else ():
                state[key] = state[key].to(self._moments)
        self._done = None


def _store(wide: Sequence[torch.Tensor], stored: Sequence[torch.Tensor], generator: torch.Generator) -> None:
    """Round what was computed in float32 to where it is stored, unless that is the same memory."""
    for values, place in zip(wide, stored, strict=True):
        if values is not place:
            round_stochastically(values, place, generator)
