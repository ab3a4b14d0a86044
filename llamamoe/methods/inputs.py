"""What one FFN sees on the calibration text, in batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .layer import ExpertWeights, FfnWeights

BATCH_TOKENS = 4096

CACHE_BYTES = 1 << 30
"""What the parent's neurons do is kept for the methods that ask again, if it takes no more than this."""


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one FFN (after its RMSNorm) on the calibration text.

    The tensors may be memory-mapped; take them batch by batch. No result may depend on the batch size beyond
    rounding.

    Attributes:
        x_TH: ``[T, H]`` on the CPU, float32 or the compute dtype.
        residual_scale_T: float32 ``[T]``, root mean square of the residual stream at each token after the parent's
            FFN: an error of the FFN counts relative to it, for the next RMSNorm divides by it. (Before the FFN it
            says nothing of the few tokens whose residual the FFN makes, or takes back, a hundred times larger.)
        gradients_TH: ``[T, H]``, gradient of the parent's loss with respect to the FFN's output, summed over
            tokens; None unless a method needs gradients.
        clusters_T: int64 ``[T]``, the text cluster of each token's document; None unless a method needs them.
        device: Where to compute.
        compute_dtype: Dtype of large matrix products.
        batch_tokens: Tokens per batch.
    """

    x_TH: torch.Tensor
    residual_scale_T: torch.Tensor
    device: torch.device
    compute_dtype: torch.dtype
    gradients_TH: torch.Tensor | None = None
    clusters_T: torch.Tensor | None = None
    batch_tokens: int = BATCH_TOKENS
    _kept: dict[int, tuple[FfnWeights, list[torch.Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return self.x_TH.shape[0]

    def batches(self) -> Iterator[slice]:
        """Slices of the tokens, in order."""
        for start in range(0, self.num_tokens, self.batch_tokens):
            yield slice(start, min(start + self.batch_tokens, self.num_tokens))

    def inputs(self) -> Iterator[torch.Tensor]:
        """The inputs in batches ``[B, H]``, on the device, in the compute dtype."""
        for part in self.batches():
            yield self.x_TH[part].to(self.device, self.compute_dtype)

    def hidden(self, ffn: FfnWeights | ExpertWeights, hidden_act: str = "silu") -> Iterator[torch.Tensor]:
        """What every neuron does, ``h = act(gate x) * (up x)``, in batches float32 ``[B, F]`` on the device.

        Methods sweep over the tokens a dozen times, so the parent's are kept (in the compute dtype, in which they are
        computed) if they fit `CACHE_BYTES`.
        """
        import torch

        from .layer import FfnWeights

        if not isinstance(ffn, FfnWeights):
            yield from self._computed(ffn.gate_PH, ffn.up_PH, hidden_act)
            return
        computed = self._computed(ffn.gate_FH, ffn.up_FH, ffn.hidden_act)
        if self.num_tokens * ffn.intermediate_size * self.compute_dtype.itemsize > CACHE_BYTES:
            yield from computed
            return
        if id(ffn) not in self._kept:  # the weights are kept too, so that their id stays theirs
            self._kept.clear()
            self._kept[id(ffn)] = ffn, [h_BF.to(self.compute_dtype) for h_BF in computed]
        for h_BF in self._kept[id(ffn)][1]:
            yield h_BF.to(torch.float32, copy=True)  # a copy, because methods may change what they get

    def _computed(self, gate_FH: torch.Tensor, up_FH: torch.Tensor, hidden_act: str) -> Iterator[torch.Tensor]:
        gate_FH, up_FH = (w.to(self.device, self.compute_dtype) for w in (gate_FH, up_FH))
        for x_BH in self.inputs():
            yield activate(x_BH @ gate_FH.T, hidden_act) * (x_BH @ up_FH.T).float()


def activate(gate_BF: torch.Tensor, hidden_act: str) -> torch.Tensor:
    """``act(gate)`` in float32."""
    from transformers.activations import ACT2FN

    out: torch.Tensor = ACT2FN[hidden_act](gate_BF.float())
    return out
