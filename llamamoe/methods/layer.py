"""One FFN layer as input and output of the methods: tensors only, no files and no model classes.

Names of sizes (suffixes of tensor names): ``H`` hidden_size, ``F`` intermediate_size, ``N`` num_experts (routed),
``W`` width of one expert with padding, ``S`` shared neurons, ``P`` = S + N W places for neurons, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..lazy import np, torch, transformers

PADDING = -1
"""The index that marks a zero neuron in ``Partition.experts``."""


@dataclass(frozen=True)
class FfnWeights:
    """The weights of one SwiGLU FFN ``y = down (act(gate x) * (up x))``, on the CPU, in the source's dtype.

    Attributes:
        gate_FH: ``[F, H]``.
        up_FH: ``[F, H]``.
        down_HF: ``[H, F]``.
        norm_H: ``[H]``, the weight of the RMSNorm before the FFN.
        hidden_act: Name of the activation, as transformers spells it.
    """

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    norm_H: torch.Tensor
    hidden_act: str = "silu"

    @property
    def intermediate_size(self) -> int:
        """``F``, the number of neurons."""
        return self.gate_FH.shape[0]

    @property
    def hidden_size(self) -> int:
        """``H``, the width of the hidden states."""
        return self.norm_H.shape[0]

    def release(self) -> None:
        """Release matrices that can be read again; does nothing in this class."""


@dataclass(frozen=True)
class LayerContext:
    """The information on a layer that methods get.

    Attributes:
        layer: Index of the layer.
        num_experts: ``N``, routed experts.
        top_k: Experts selected per token.
        expert_width: ``W``, the maximum number of neurons of one expert.
        seed: The recipe's seed; use `rng` rather than this.
        calibration: Inputs of the FFN on the calibration text; None without text.
    """

    layer: int
    num_experts: int
    top_k: int
    expert_width: int
    seed: int
    calibration: LayerInputs | None = None

    @property
    def inputs(self) -> LayerInputs:
        """The calibration inputs, for methods that ``need`` them (the plan refuses these without text).

        Raises:
            ValueError: There are no calibration inputs.
        """
        if self.calibration is None:
            raise ValueError("this method needs calibration inputs")
        return self.calibration

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a generator that depends on seed, layer and purpose only (not on the order of layers or resumes)."""
        return np.random.default_rng([self.seed, self.layer, *purpose.encode()])


@dataclass(frozen=True)
class Partition:
    """A partition of neurons into experts, shared and omitted ones.

    Attributes:
        experts: int64 ``[N, W]``; neuron indices in ascending order, then `PADDING` (-1) for zero neurons.
        shared: int64 ``[S]``, ascending; neurons that every token uses.
        omitted: int64, ascending; neurons that are dropped (empty for every exact splitter).
        router_NH: float32 ``[N, H]`` router rows that belong to the partition (centroids, learned rows), or None.
    """

    experts: np.ndarray
    shared: np.ndarray
    omitted: np.ndarray
    router_NH: torch.Tensor | None = None

    @property
    def slots(self) -> np.ndarray:
        """int64 ``[P]``, P = S + N W: the neuron in every place, shared ones first, then expert by expert."""
        return np.concatenate([self.shared, self.experts.ravel()])

    @classmethod
    def from_labels(
        cls, neurons: np.ndarray, labels: np.ndarray, context: LayerContext, shared: np.ndarray
    ) -> Partition:
        """Build a partition from a label per neuron.

        Args:
            neurons: int64 ``[F - S]``, the neurons that are routed.
            labels: int ``[F - S]``, the expert of each of them, 0 .. N-1.
            context: The context with N and W.
            shared: int64 ``[S]``.

        Raises:
            ValueError: An expert would get more neurons than its width holds.
        """
        sizes = np.bincount(labels, minlength=context.num_experts)
        if sizes.max(initial=0) > context.expert_width or len(sizes) > context.num_experts:
            raise ValueError(f"expert sizes {sizes.tolist()} do not fit {context.num_experts} x {context.expert_width}")
        order = np.lexsort((neurons, labels))
        experts = np.full((context.num_experts, context.expert_width), PADDING, dtype=np.int64)
        column = np.arange(len(neurons)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        experts[labels[order], column] = neurons[order]
        return cls(experts, np.sort(shared).astype(np.int64), np.empty(0, np.int64))

    def places(self) -> np.ndarray:
        """Return int64 ``[F]``: the expert of each neuron, N for shared and N + 1 for omitted ones.

        Each neuron must be in exactly one place (see `check`).
        """
        routed = self.experts != PADDING
        places = np.empty(int(routed.sum()) + len(self.shared) + len(self.omitted), np.int64)
        places[self.experts[routed]] = np.nonzero(routed)[0]
        places[self.shared], places[self.omitted] = len(self.experts), len(self.experts) + 1
        return places

    def check(self, intermediate_size: int, *, overlap: bool = False) -> None:
        """Check that each of the F neurons appears exactly once (at least once if ``overlap``).

        Raises:
            ValueError: A neuron is missing, repeated or out of range.
        """
        used = np.concatenate([self.experts.ravel(), self.shared, self.omitted])
        used = used[used != PADDING]
        if used.size and (used.min() < 0 or used.max() >= intermediate_size):
            raise ValueError(f"neuron indices must lie in 0..{intermediate_size - 1}")
        counts = np.bincount(used, minlength=intermediate_size)
        wrong = np.flatnonzero(counts < 1 if overlap else counts != 1)
        if wrong.size:
            raise ValueError(
                f"{wrong.size} neurons do not appear exactly once, the first is {wrong[0]} ({counts[wrong[0]]} times)"
            )


@dataclass(frozen=True)
class ExpertWeights:
    """Weights that replace the parent's, one row (gate, up) or column (down) for every place of `Partition.slots`.

    They are in the parent's units, without the rescale's coefficient and the target's factors. All zero where
    the slot is `PADDING`.

    Attributes:
        gate_PH: float32 ``[P, H]``.
        up_PH: float32 ``[P, H]``.
        down_HP: float32 ``[H, P]``.
    """

    gate_PH: torch.Tensor
    up_PH: torch.Tensor
    down_HP: torch.Tensor

    @classmethod
    def of_parent(cls, ffn: FfnWeights, partition: Partition) -> ExpertWeights:
        """Return the parent's own weights, copied to every place of the partition."""
        slots = torch.from_numpy(partition.slots)
        index = slots.clamp(min=0)
        kept = (slots != PADDING).to(torch.float32)
        gate, up = ffn.gate_FH[index].float(), ffn.up_FH[index].float()
        return cls(gate * kept[:, None], up * kept[:, None], ffn.down_HF[:, index].float() * kept)


BATCH_TOKENS = 4096
BATCH_NUMBERS = 2**27
"""Maximum number of activations of a batch: half a gigabyte in float32."""
CACHE_BYTES = 1 << 30
"""Maximum size of the parent's activations up to which they are cached for repeated use."""


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one FFN (after its RMSNorm) on the calibration text.

    The tensors may be memory-mapped; read them batch by batch. No result may depend on the batch size beyond
    rounding.

    Attributes:
        x_TH: ``[T, H]`` on the CPU, float32 or the compute dtype.
        residual_scale_T: float32 ``[T]``, root mean square of the residual stream at each token after the parent's
            FFN: errors of the FFN count relative to it, because the next RMSNorm divides by it. (Before the FFN it
            is not meaningful for the few tokens whose residual the FFN makes a hundred times larger or smaller.)
        gradients_TH: ``[T, H]``, gradient of the parent's loss with respect to the FFN's output, summed over
            tokens; None unless a method needs gradients.
        clusters_T: int64 ``[T]``, the text cluster of each token's document; None unless a method needs them.
        device: Device of the computation.
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
        """``T``, the number of tokens."""
        return self.x_TH.shape[0]

    def batches(self) -> Iterator[slice]:
        """Yield slices of the tokens, in order."""
        for start in range(0, self.num_tokens, self.batch_tokens):
            yield slice(start, min(start + self.batch_tokens, self.num_tokens))

    def inputs(self) -> Iterator[torch.Tensor]:
        """Yield the inputs in batches ``[B, H]``, on the device, in the compute dtype."""
        for part in self.batches():
            yield self.x_TH[part].to(self.device, self.compute_dtype)

    def hidden(self, ffn: FfnWeights | ExpertWeights, hidden_act: str = "silu") -> Iterator[torch.Tensor]:
        """Yield every neuron's activation ``h = act(gate x) * (up x)`` in batches float32 ``[B, F]`` on the device.

        Methods pass over the tokens a dozen times, so the parent's are cached (in the compute dtype, in which they are
        computed) if they fit `CACHE_BYTES`.
        """
        if not isinstance(ffn, FfnWeights):
            yield from self._computed(ffn.gate_PH, ffn.up_PH, hidden_act)
            return
        computed = self._computed(ffn.gate_FH, ffn.up_FH, ffn.hidden_act)
        if self.num_tokens * ffn.intermediate_size * self.compute_dtype.itemsize > CACHE_BYTES:
            yield from computed
            return
        if id(ffn) not in self._kept:  # the weights are kept too, so that their id is not reused
            self._kept.clear()
            self._kept[id(ffn)] = ffn, [h_BF.to(self.compute_dtype) for h_BF in computed]
        for h_BF in self._kept[id(ffn)][1]:
            yield h_BF.to(torch.float32, copy=True)  # a copy, because methods may modify it

    def _computed(self, gate_FH: torch.Tensor, up_FH: torch.Tensor, hidden_act: str) -> Iterator[torch.Tensor]:
        gate_FH, up_FH = (w.to(self.device, self.compute_dtype) for w in (gate_FH, up_FH))
        for x_BH in self.inputs():
            yield activate(x_BH @ gate_FH.T, hidden_act) * (x_BH @ up_FH.T).float()


def batch_tokens(places: int) -> int:
    """Return the tokens of a batch for a layer of P = ``places``: fewer than `BATCH_TOKENS` if it is very wide."""
    return max(1, min(BATCH_TOKENS, BATCH_NUMBERS // max(places, 1)))


def activate(gate_BF: torch.Tensor, hidden_act: str) -> torch.Tensor:
    """Return ``act(gate)`` in float32."""
    out: torch.Tensor = transformers.activations.ACT2FN[hidden_act](gate_BF.float())
    return out


TokenWeighting = Literal["none", "residual"]
LEAST_RESIDUAL = 1e-3
"""Lower bound of a token's residual stream, as a share of the median."""


def token_scales(inputs: LayerInputs, weighting: TokenWeighting) -> torch.Tensor | None:
    """Return the factor of each token's error before squaring, float32 ``[T]`` of mean square 1; None for all ones.

    ``"residual"``: the inverse root mean square of the token's residual stream, by which the next RMSNorm divides.
    """
    if weighting == "none" or inputs.num_tokens == 0:
        return None
    size = inputs.residual_scale_T.double()
    scales = 1 / size.clamp(min=max(LEAST_RESIDUAL * float(size.median()), 1e-30))
    return (scales / scales.square().mean().sqrt()).float()
