"""GShard: two experts per token with a capacity, and overflow to the next best expert."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...lazy import torch
from ...plugins import PluginOptions
from ..moe_layers import MoeLayer
from .base import Gate, Gated, Native
from .selection import CapacityFactor, capacity, positions, ranked_TN, weights_Tk


class GShard(Gate):
    """Top-2 with capacity ``ceil(capacity_factor 2 T / N)`` per expert and micro-batch.

    All first choices are served before any second choice, tokens in their order. A first choice without room is
    dropped. A second choice without room goes to the token's next best expert, in rounds: in each round the tokens that
    are still unplaced try their next expert, in order (``overflow: drop`` ends after the first round, as in the paper).
    A token without any room is dropped: weight 0, see ``switch``.

    Weights are the router's for the two final experts, before drops: a token that lost one of them does not
    put more on the other. ``random_second`` serves a second choice only with probability ``2 g_2 / (g_1 + g_2)``.
    """

    name = "gshard"
    summary = "top-2 with a capacity per expert, second choices overflow to the next expert"
    reference = "arXiv:2006.16668"
    top_k: ClassVar[int | None] = 2

    class Options(PluginOptions):
        """Options of `GShard`."""

        capacity_factor: CapacityFactor = 1.25
        overflow: Literal["next", "drop"] = Field("next", description="Where a second choice without room goes.")
        random_second: bool = Field(
            False, description="Serve second choices at random, in proportion to their weight, as the paper does."
        )

    options: Options

    def route(self, moe: MoeLayer, native: Native, hidden: torch.Tensor) -> Gated:
        """See `Gate.route`. O(T log T) a round, at most N - 1 rounds, as many as tokens still wait."""
        logits_TN, native_weights, _ = native(hidden)
        ranked = ranked_TN(moe, logits_TN)
        order_TN = ranked.argsort(dim=-1, descending=True, stable=True)
        wanted_Tk = order_TN[:, :2].contiguous()
        room = capacity(self.options.capacity_factor, len(logits_TN), moe)
        used_N = torch.bincount(wanted_Tk[:, 0], minlength=moe.num_experts).clamp(max=room)
        first_kept_T = positions(wanted_Tk[:, 0]) < room
        # Experts of an excluded group are ranked last and never tried.
        rounds = int(ranked.isfinite().sum(-1).min()) if self.options.overflow == "next" else 2
        waiting_T = self._served(moe, weights_Tk(moe, logits_TN, wanted_Tk).detach())
        second_T, placed_T = _place_second(order_TN[:, 1:rounds], waiting_T, used_N, room)
        indices_Tk = torch.stack([wanted_Tk[:, 0], torch.where(placed_T, second_T, wanted_Tk[:, 1])], -1)
        dropped_Tk = ~torch.stack([first_kept_T, placed_T], -1)
        weights = weights_Tk(moe, logits_TN, indices_Tk).to(native_weights.dtype).masked_fill(dropped_Tk, 0)
        return Gated(logits_TN, weights, indices_Tk, {"dropped_Tk": dropped_Tk, "wanted_Tk": wanted_Tk})

    def _served(self, moe: MoeLayer, weights: torch.Tensor) -> torch.Tensor:
        """Return the tokens whose second choice is served at all: bool ``[T]``."""
        if not self.options.random_second:
            return torch.ones(len(weights), dtype=torch.bool, device=weights.device)
        drawn_T = torch.rand(len(weights), device=weights.device, generator=self.generator(moe, weights.device))
        return 2 * weights[:, 1] / weights.sum(-1) > drawn_T


def _place_second(
    choices_TR: torch.Tensor, waiting_T: torch.Tensor, used_N: torch.Tensor, room: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the final expert of each unplaced token, and whether it got one."""
    found_T = torch.zeros_like(choices_TR[:, 0])
    placed_T = torch.zeros_like(waiting_T)
    waiting = waiting_T.nonzero()[:, 0]
    for choice_T in choices_TR.unbind(-1):
        if not len(waiting):
            break
        asked = choice_T[waiting]
        fits = positions(asked) + used_N[asked] < room
        found_T[waiting[fits]] = asked[fits]
        placed_T[waiting[fits]] = True
        used_N = used_N + torch.bincount(asked[fits], minlength=len(used_N))
        waiting = waiting[~fits]
    return found_T, placed_T
