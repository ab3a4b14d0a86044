"""Learned noise on the logits: the gate of the first sparsely-gated mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..moe_layers import MoeLayer
from .base import Gate, Gated, Native
from .selection import ranked_TN, weights_Tk


class NoisyTopK(Gate):
    """KeepTopK of ``logits + softplus(W_noise x + offset) normal()``, with noisy selection and weights.

    The noise's standard deviation is ``softplus(x W_noise) + floor``, with ``W_noise`` zero at first: 0.69 + floor for
    every expert. The logits of a hard router (below 1/256) vanish in it, so soften routers first.

    Weights are the router's own for the noisy logits: renormalising routers take the softmax over the selected
    noisy logits, as in the paper; others the softmax over all noisy logits, or their sigmoid, without renormalising.
    Losses get the clean logits and, separately, the noisy ones.
    """

    name = "noisy_top_k"
    summary = "top_k of logits with learned normal noise (KeepTopK)"
    reference = "arXiv:1701.06538"
    noisy: ClassVar[bool] = True
    allows_bias: ClassVar[bool] = False
    kept_TN: ClassVar[int] = 3  # the noise, the inputs of its size, and scores of the noisy logits

    class Options(PluginOptions):
        """Options of `NoisyTopK`."""

        floor: float = Field(0.01, gt=0, allow_inf_nan=False, description="Least standard deviation of the noise.")

    options: Options
    _rows: torch.nn.ParameterDict | None = None

    def attach(self, layers: Sequence[MoeLayer], seed: int) -> None:
        """See `Gate.attach`. Makes the noise's rows, float32 ``[N, H]`` per layer."""
        super().attach(layers, seed)
        rows = {}  # unsharded on every rank, even if FSDP shards the routers' own
        for moe in layers:
            rows_NH = torch.zeros(tuple(moe.router_NH.shape), dtype=torch.float32, device=moe.router_NH.device)
            rows[moe.key] = torch.nn.Parameter(rows_NH)
        self._rows = torch.nn.ParameterDict(rows)

    def route(self, moe: MoeLayer, native: Native, hidden: torch.Tensor) -> Gated:
        """See `Gate.route`."""
        assert self._rows is not None
        logits_TN, native_weights, _ = native(hidden)
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            spread_TN = x_TH.float() @ self._rows[moe.key].T
        std_TN = torch.nn.functional.softplus(spread_TN) + self.options.floor
        generator = self.generator(moe, hidden.device)
        normal_TN = torch.empty_like(std_TN).normal_(generator=generator)
        noisy_TN = logits_TN.float() + normal_TN * std_TN
        indices_Tk = ranked_TN(moe, noisy_TN).topk(moe.top_k, dim=-1)[1]
        weights = weights_Tk(moe, noisy_TN, indices_Tk).to(native_weights.dtype)
        return Gated(logits_TN, weights, indices_Tk, {"selection_TN": noisy_TN, "noise_std_TN": std_TN})

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """See `Gate.parameters`."""
        return iter(()) if self._rows is None else self._rows.parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Gate.state_dict`: by layer index."""
        return {} if self._rows is None else dict(self._rows.state_dict())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Gate.load_state_dict`."""
        assert self._rows is not None
        self._rows.load_state_dict(state)
