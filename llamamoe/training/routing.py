"""Record the routing of a micro-batch's tokens while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..lazy import torch
from .moe_layers import MoeLayer


@dataclass(frozen=True)
class Routing:
    """The routing of T tokens by one router.

    Attributes:
        moe: The layer.
        logits_TN: The raw logits, before any noise, with their gradient.
        weights_Tk: Factor of each selected expert's output; 0 for a dropped assignment.
        indices_Tk: int64, the selected experts.
        selection_TN: The logits that experts were selected by, if a gate added noise to them; else None.
        noise_std_TN: Standard deviation of that noise, if known; else None.
        dropped_Tk: bool, assignments without room in their expert; None if the gate does not drop.
        inputs_TH: Inputs of the router; only if a loss needs them.
        wanted_Tk: int64, the router's choice before full experts passed on assignments; None: ``indices_Tk``.
    """

    moe: MoeLayer
    logits_TN: torch.Tensor
    weights_Tk: torch.Tensor
    indices_Tk: torch.Tensor
    selection_TN: torch.Tensor | None = None
    noise_std_TN: torch.Tensor | None = None
    dropped_Tk: torch.Tensor | None = None
    inputs_TH: torch.Tensor | None = None
    wanted_Tk: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return len(self.logits_TN)

    @property
    def probabilities_TN(self) -> torch.Tensor:
        """float32 (float64 of float64) with rows of sum 1: softmax of the logits, or sigmoid scores over their sum."""
        logits = at_least_float32(self.logits_TN)
        if self.moe.weighting.startswith("sigmoid"):
            scores = logits.sigmoid()
            return scores / scores.sum(-1, keepdim=True)
        return logits.softmax(-1)

    def counts_N(self) -> torch.Tensor:
        """Return float32: the number of assignments of each expert without dropped ones. No gradient."""
        kept = None if self.dropped_Tk is None else ~self.dropped_Tk
        return self._count_N(self.indices_Tk, kept)

    def wanted_counts_N(self) -> torch.Tensor:
        """Return float32: each expert's number of assignments by the router, with or without room. No gradient."""
        return self._count_N(self.indices_Tk if self.wanted_Tk is None else self.wanted_Tk, None)

    def _count_N(self, indices_Tk: torch.Tensor, kept_Tk: torch.Tensor | None) -> torch.Tensor:
        flat = indices_Tk.reshape(-1)
        ones = torch.ones_like(flat, dtype=torch.float32) if kept_Tk is None else kept_Tk.reshape(-1).float()
        return torch.zeros(self.moe.num_experts, device=flat.device).scatter_add_(0, flat, ones)


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Cast narrower dtypes to float32 and keep float64, since losses must not be computed in bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class RouterTap:
    """A recorder of every router's decisions while it is armed.

    Hooks stay attached to the native routers and record only inside ``with tap.armed():``; the second forward pass
    of gradient checkpointing comes after it, and is not recorded.

    Args:
        layers: The layers to record.
    """

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self._armed = False
        self._inputs = False
        self._found: dict[tuple[int, str], Routing] = {}
        self._handles = [moe.router.register_forward_hook(self._hook(moe)) for moe in layers]

    def _hook(self, moe: MoeLayer) -> Any:
        def record(router: torch.nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            # also removed in the unrecorded second pass of checkpointing, because it would hold that pass's graph
            extra = router.__dict__.pop("gate_extra", None) or {}
            if self._armed:
                logits, weights, indices = moe.decisions(output)
                seen = args[0].reshape(-1, args[0].shape[-1]) if self._inputs else None
                found = Routing(moe, logits, weights, indices, inputs_TH=seen)
                self._found[moe.place] = replace(found, **extra)

        return record

    @contextmanager
    def armed(self, *, inputs: bool = False) -> Iterator[list[Routing]]:
        """Record one forward pass; the yielded list is filled at the end, in order of depth.

        Args:
            inputs: Whether to record the routers' inputs too.
        """
        self._armed, self._inputs = True, inputs
        self._found = {}
        found: list[Routing] = []
        try:
            yield found
            found.extend(self._found[place] for place in sorted(self._found))
        finally:
            self._armed, self._found = False, {}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
