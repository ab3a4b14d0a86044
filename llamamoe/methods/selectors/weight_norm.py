"""Select shared neurons by the size of their weights."""

from __future__ import annotations

from ...lazy import np, torch
from ..layer import FfnWeights, LayerContext
from .base import Selector


class WeightNorm(Selector):
    """Score ``||gate_j * norm|| ||up_j * norm|| ||down_:j||``.

    A neuron's output is ``silu(gate_j·x) (up_j·x) down_:j``: for inputs of any fixed size it grows with each of the
    three norms, and the product does not change when a factor is moved from one matrix to another. ``x`` is the
    RMSNorm's output, so the norm's weight is included in the rows that read it. Folklore: pruning by magnitude.
    """

    name = "weight_norm"
    summary = "product of the norms of the neuron's gate row, up row and down column"
    needs = "weights"

    def scores(self, ffn: FfnWeights, context: LayerContext) -> np.ndarray:
        """See `Selector.scores`. O(F H), in blocks of 1024 neurons so that no float copy of a matrix is made."""
        norm = ffn.norm_H.float()
        out = torch.empty(ffn.intermediate_size, dtype=torch.float64)
        for start in range(0, ffn.intermediate_size, 1024):
            block = slice(start, start + 1024)
            gate = (ffn.gate_FH[block].float() * norm).norm(dim=1).double()
            up = (ffn.up_FH[block].float() * norm).norm(dim=1).double()
            out[block] = gate * up * ffn.down_HF[:, block].float().norm(dim=0).double()
        return out.numpy()
