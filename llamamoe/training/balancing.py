"""Balance experts without a loss: a bias for the selection only, moved against an expert's load after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from ..errors import RefusedError
from ..lazy import torch
from ..plugins import PluginOptions
from .moe_layers import MoeLayer
from .routing import Routing


class BalancingOptions(PluginOptions):
    """Options of `BiasBalancing`."""

    rate: float = Field(0.001, gt=0, lt=1, description="How far a bias moves in one optimiser step.")
    form: Literal["sign", "proportional"] = Field(
        "sign",
        description="Move by the rate against the sign of an expert's excess load, or by rate x relative excess.",
    )


class BiasBalancing:
    """``b_e += rate sign(mean load - load_e)`` once per optimiser step (Wang et al. 2024, arXiv:2408.15664).

    The bias is added to the router's scores when experts are selected and to nothing else, so no gradient disturbs the
    language model. It is the native correction bias (glm4_moe, ernie4_5_moe), and saved with the model. Its unit is
    that of the scores: sigmoids, or probabilities, which for large N are small: choose ``rate`` well below 1/N for
    ernie4_5_moe. ``proportional``: ``b_e += rate (mean load - load_e) / mean load``, the paper's variant made
    independent of the batch.

    Usage: `observe` for every micro-batch, `update` once after the optimiser step.

    Args:
        layers: All layers of the model.
        options: Rate and form.
        all_reduce: Sums a tensor over ranks (`ranks.sum_over_ranks`); None in a run of one process. With it, `update`
            is a collective call, and the biases stay the same on all ranks.

    Raises:
        RefusedError: A router has no correction bias, or one of so few digits that steps would be rounded away.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        options: BalancingOptions | None = None,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.options = options or BalancingOptions()
        self._layers = list(layers)
        self._all_reduce = all_reduce
        self._counts: dict[tuple[int, str], torch.Tensor] = {}
        for moe in self._layers:
            _check(moe)

    def observe(self, routings: Sequence[Routing]) -> None:
        """Count the routers' choices in one micro-batch, without synchronisation."""
        for routing in routings:
            counts_N = routing.wanted_counts_N()
            before_N = self._counts.get(routing.moe.place)
            self._counts[routing.moe.place] = counts_N if before_N is None else before_N + counts_N

    def update(self) -> None:
        """Move the biases by the counts since the last update, and reset the counts.

        Raises:
            ValueError: A layer was not observed since then, because `update` was called twice in a step.
        """
        from .ranks import cut_like

        missing = [moe.layer for moe in self._layers if moe.place not in self._counts]
        if missing:
            raise ValueError(f"layers {missing} were not observed since the last update: one update per optimiser step")
        with torch.no_grad():
            for moe, counts_N in zip(self._layers, self._total_counts(), strict=True):
                relative_N = 1 - counts_N / counts_N.mean()
                step_N = relative_N.sign() if self.options.form == "sign" else relative_N
                bias = moe.correction_bias
                assert bias is not None
                step = (self.options.rate * step_N).to(bias.device, bias.dtype).view(bias.shape)
                bias.add_(cut_like(step, bias))
        self._counts = {}

    def _total_counts(self) -> list[torch.Tensor]:
        """Return the counts of all ranks, in one communication."""
        counts = [self._counts[moe.place] for moe in self._layers]
        if self._all_reduce is None:
            return counts
        total = self._all_reduce(torch.cat([each.to(counts[0].device) for each in counts]))
        return list(torch.split(total, [len(each) for each in counts]))


def _check(moe: MoeLayer) -> None:
    bias = moe.correction_bias
    if bias is None:
        raise RefusedError(
            f"layer {moe.layer}: {type(moe.router).__name__} has no correction bias, which loss-free balancing moves: "
            "softmax routers of this architecture select by their weights alone.",
            hint="Balance with a loss (switch or cv_squared), or convert with --target glm4_moe or ernie4_5_moe.",
        )
    if bias.dtype.itemsize < torch.float32.itemsize:
        raise RefusedError(
            f"layer {moe.layer}: the correction bias is {bias.dtype}: small steps would be rounded away.",
            hint="Load the model with from_pretrained(..., dtype=...), which keeps it in float32; do not cast it after.",
        )
