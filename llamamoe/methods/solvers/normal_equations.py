"""Sum the normal equations of closed-form repairs over the calibration tokens.

With ``h~`` ``[T, P]`` the activation of every place times its weight, ``D0`` the places' down projections and ``Y`` the
dense output, the error ``Y - h~ D`` of any ``D`` depends on the tokens only through the Gram ``h~^T h~`` and the
products ``h~^T (Y - h~ D0)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ...lazy import torch
from ...numerics import check_finite, double_device
from ..layer import PADDING, FfnWeights, LayerContext, LayerInputs, Partition, TokenWeighting, token_scales
from ..moe_layer import ConvertedFfn, MixtureFfn, dense_outputs

BLOCK_PLACES = 512
"""Width up to which several experts are summed at a time: products with few rows are slow, and so is gathering rows."""

MOST_ROWS = 0.6
"""Share of tokens selecting a block of experts from which all tokens are summed for it."""

HELD_OUT_EVERY = 5
"""Number of runs of tokens of which one is held out."""

RUN_TOKENS = 256
"""Maximum run of tokens that are held out together, because neighbouring tokens are correlated."""


@dataclass(frozen=True)
class NormalEquations:
    """Sums over tokens, float64.

    Attributes:
        gram_PP: ``[P, P]``, ``h~^T h~``.
        cross_PH: ``[P, H]``, ``h~^T (Y - h~ D0)``.
        slots_P: int64, the neuron in every place.
    """

    gram_PP: torch.Tensor
    cross_PH: torch.Tensor
    slots_P: torch.Tensor

    @property
    def places(self) -> torch.Tensor:
        """int64 ``[Q]``: places that hold a neuron and were ever active; the others have zero rows and columns."""
        return ((self.slots_P != PADDING) & (self.gram_PP.diagonal() > 0)).nonzero().flatten()

    def gram(self, places: torch.Tensor) -> torch.Tensor:
        """Return ``[Q, Q]``, the Gram of these places; the Gram itself, not a copy, if they are all."""
        return self.gram_PP if len(places) == len(self.gram_PP) else self.gram_PP[places][:, places]


@dataclass(frozen=True)
class Block:
    """Places of a layer whose equations are solved together: experts, and before the first of them the shared ones.

    Attributes:
        places: The places.
        experts: Their experts.
        shared: Number of shared places among them.
        width: Places of an expert.
    """

    places: slice
    experts: slice
    shared: int
    width: int


def blocks(partition: Partition, most_places: int) -> list[Block]:
    """Return consecutive blocks of at most ``most_places``, but of one expert, or the shared places, at least."""
    shared, (num_experts, width) = len(partition.shared), partition.experts.shape
    at_once = max(1, most_places // max(width, 1))
    first = min(num_experts, max(0 if shared else 1, (most_places - shared) // max(width, 1)))
    ends = [first, *range(first + at_once, num_experts, at_once), *([num_experts] if first < num_experts else [])]
    found = [Block(slice(0, shared + first * width), slice(0, first), shared, width)]
    for start, stop in pairwise(ends):
        found.append(Block(slice(shared + start * width, shared + stop * width), slice(start, stop), 0, width))
    return found


def normal_equations(
    moe: ConvertedFfn,
    ffn: FfnWeights,
    context: LayerContext,
    weighting: TokenWeighting,
    block: Block,
    *,
    hold_out: bool = False,
) -> list[NormalEquations]:
    """Sum over all calibration tokens for a block of places, products in float32, sums over batches in float64.

    An expert's rows are summed over the tokens that selected it only, and each pair of experts once: O(T P H) for
    the outputs and about ``T (S + k W)^2 / 2`` products for the Gram. Memory: ``Q (Q + H)`` doubles for each sum of Q places.

    Args:
        moe: The layer to repair.
        ffn: The parent's FFN.
        context: The context with the calibration inputs.
        weighting: ``"residual"`` divides every token's error by the root mean square of its residual stream.
        block: The places.
        hold_out: Whether to sum the tokens of every fifth run separately.

    Returns:
        One sum for all tokens, or two: for those to fit on, and for those held out.

    Raises:
        LlamaMoeError: An activation is NaN or infinite.
    """
    inputs = context.inputs
    device = double_device(inputs.device)
    slots = torch.from_numpy(moe.partition.slots)[block.places].to(device)
    sums = []
    for _ in range(1 + hold_out):
        gram = torch.zeros(len(slots), len(slots), dtype=torch.float64, device=device)
        cross = torch.zeros(len(slots), ffn.down_HF.shape[0], dtype=torch.float64, device=device)
        sums.append(NormalEquations(gram, cross, slots))
    fold_T = held_out_tokens(inputs.num_tokens).long() if hold_out else torch.zeros(inputs.num_tokens).long()
    scales = token_scales(inputs, weighting)
    for part, (hidden, residual, weights) in zip(inputs.batches(), residuals(moe, ffn, inputs), strict=True):
        batch = hidden[:, block.places], residual, weights[:, block.experts]
        if scales is not None:
            scale_B1 = scales[part].to(inputs.device)[:, None]
            batch = batch[0] * scale_B1, batch[1] * scale_B1, batch[2]
        for fold, into in enumerate(sums):
            rows = (fold_T[part] == fold).nonzero().flatten().to(inputs.device)
            hidden_BP, residual_BH, weights_BN = batch if len(rows) == len(batch[0]) else (t[rows] for t in batch)
            _add(into, hidden_BP, residual_BH, weights_BN, block)
    for into in sums:
        _mirror(into.gram_PP, block)
        check_finite(context.layer, into.gram_PP.diagonal(), into.cross_PH)
    return sums


def held_out_tokens(num_tokens: int) -> torch.Tensor:
    """Return the held-out tokens, bool ``[T]``: the last of every five runs of up to 256 tokens."""
    run = max(1, min(RUN_TOKENS, num_tokens // (8 * HELD_OUT_EVERY)))
    return torch.arange(num_tokens) // run % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def residuals(
    moe: ConvertedFfn, ffn: FfnWeights, inputs: LayerInputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield batches: ``h~`` float32 ``[B, P]``, ``Y - h~ D0`` float32 ``[B, H]``, and experts' weights ``[B, N]``.

    If the layer's neurons are the parent's own, they are computed once, and the error follows from how often
    each was counted: exactly 0 for a token that counts each neuron once.
    """
    if not holds_parent(moe, ffn):
        down_HP = moe.weights.down_HP.to(inputs.device, inputs.compute_dtype)
        hidden = inputs.hidden(moe.weights, moe.hidden_act)
        for x_BH, h_BP, y_BH in zip(inputs.inputs(), hidden, dense_outputs(inputs, ffn), strict=True):
            weights_BN = moe.expert_weights(x_BH)
            h_BP = h_BP * moe.place_weights(weights_BN)
            yield h_BP, y_BH - (h_BP.to(inputs.compute_dtype) @ down_HP.T).float(), weights_BN
        return
    slots = torch.from_numpy(moe.partition.slots).to(inputs.device)
    real = (slots != PADDING).float()
    slots = slots.clamp(min=0)
    down_HF = ffn.down_HF.to(inputs.device, inputs.compute_dtype)
    for x_BH, h_BF in zip(inputs.inputs(), inputs.hidden(ffn), strict=True):
        weights_BN = moe.expert_weights(x_BH)
        counts_BP = moe.place_weights(weights_BN) * real
        missing_BF = torch.ones_like(h_BF).index_add_(1, slots, counts_BP, alpha=-1)
        residual_BH = ((missing_BF * h_BF).to(inputs.compute_dtype) @ down_HF.T).float()
        yield h_BF[:, slots] * counts_BP, residual_BH, weights_BN


def holds_parent(moe: ConvertedFfn, ffn: FfnWeights) -> bool:
    """Return whether every place of the layer holds the neuron of a dense parent unchanged."""
    if isinstance(ffn, MixtureFfn):
        return False
    slots = torch.from_numpy(moe.partition.slots)
    kept = (slots != PADDING).nonzero().flatten()
    index, weights = slots[kept], moe.weights
    return (
        torch.equal(weights.gate_PH[kept], ffn.gate_FH[index].float())
        and torch.equal(weights.up_PH[kept], ffn.up_FH[index].float())
        and torch.equal(weights.down_HP[:, kept], ffn.down_HF[:, index].float())
    )


def _add(
    into: NormalEquations,
    hidden_BP: torch.Tensor,
    residual_BH: torch.Tensor,
    weights_BN: torch.Tensor,
    block: Block,
) -> None:
    """Add one batch: shared x shared, and each few experts x (shared, themselves, later experts)."""
    shared, width = block.shared, block.width
    gram, cross, device = into.gram_PP, into.cross_PH, into.gram_PP.device
    if shared:
        left_SB = hidden_BP[:, :shared].T
        gram[:shared, :shared] += (left_SB @ hidden_BP[:, :shared]).to(device)
        cross[:shared] += (left_SB @ residual_BH).to(device)
    for first, last in _few(block):
        start, stop = shared + first * width, shared + last * width
        some = (weights_BN[:, first:last] != 0).any(dim=1)
        left_BP, left_BH = hidden_BP, residual_BH
        if int(some.sum()) <= MOST_ROWS * len(some):
            rows = some.nonzero().flatten()
            left_BP, left_BH = hidden_BP.index_select(0, rows), residual_BH.index_select(0, rows)
        left_WB = left_BP[:, start:stop].T
        gram[start:stop, start:] += (left_WB @ left_BP[:, start:]).to(device)
        gram[start:stop, :shared] += (left_WB @ left_BP[:, :shared]).to(device)
        cross[start:stop] += (left_WB @ left_BH).to(device)


def _mirror(gram: torch.Tensor, block: Block) -> None:
    """Fill in the half of the Gram that `_add` leaves out."""
    shared, width = block.shared, block.width
    gram[:shared, shared:] = gram[shared:, :shared].T
    for first, last in _few(block):
        start, stop = shared + first * width, shared + last * width
        gram[stop:, start:stop] = gram[start:stop, stop:].T


def _few(block: Block) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of the block's experts that are summed at a time."""
    step, num_experts = max(1, BLOCK_PLACES // max(block.width, 1)), block.experts.stop - block.experts.start
    for first in range(0, num_experts, step):
        yield first, min(first + step, num_experts)
