"""The contract of a rescale: how much a selected expert's output counts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...plugins import Plugin


class Rescale(Plugin, ABC):
    """The factor ``c`` that each selected expert ends up with when the router weighs them equally.

    The target turns ``c`` into what its router can do: a factor baked into the experts' down projections or a
    factor in the configuration (see `llamamoe.architectures.targets.base.combine`).
    """

    @abstractmethod
    def coefficient(self, num_experts: int, top_k: int) -> float:
        """``c`` for N experts of which k are selected.

        Where experts are copies (upcycling), N is the number of experts that together hold the FFN once.
        """
