"""Rescales: factors of a selected expert's output. Each is one formula, so they share this file."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..plugins import Plugin, Registry


class Rescale(Plugin, ABC):
    """The factor ``c`` that each selected expert ends up with when the router weighs them equally.

    The target turns ``c`` into what its router supports: a factor baked into the experts' down projections or a
    factor in the configuration (see `llamamoe.architectures.targets.base.Target.combine`).
    """

    @abstractmethod
    def coefficient(self, num_experts: int, top_k: int) -> float:
        """Return ``c`` for N experts of which k are selected.

        Where experts are copies (upcycling), N is the number of experts that together hold the FFN once.
        """


class Dropout(Rescale):
    """``c = N/k``: the sum over k experts drawn at random has the mean of the sum over all N, as in dropout."""

    name = "dropout"
    summary = "c = N/k, the right mean when experts are selected at random"
    reference = "Dropout (Srivastava et al. 2014), scaling at training time"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return num_experts / top_k


class LlamaMoe(Rescale):
    """``y = (N/k) sum_i w_i E_i`` with weights that sum to 1, so ``c = N/k^2``. For reproduction; never exact."""

    name = "llama_moe"
    summary = "c = N/k^2, as LLaMA-MoE runs it (score_scale_factor = N/k); for reproduction"
    reference = "LLaMA-MoE (arXiv:2406.16554)"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return num_experts / top_k**2


class Mean(Rescale):
    """``c = 1/k`` for k copies of the whole FFN; ``c = G/k`` for copies of its G parts, of which k/G full sets count.

    In general N/k with N the experts that hold the FFN once: the number of `Dropout`, but for another reason; for
    copies it is exact at every k that is a multiple of G.
    """

    name = "mean"
    summary = "c = 1/k for copies of the FFN (G/k for copies of G parts): selected copies are averaged"
    reference = "Sparse upcycling (arXiv:2212.05055), combine weights that sum to 1"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return num_experts / top_k


class Unit(Rescale):
    """``c = 1``: a selected expert contributes exactly what it contributed in the dense FFN."""

    name = "unit"
    summary = "c = 1, selected experts count as in the dense FFN"
    reference = "CMoE (arXiv:2502.04416), training-free weights"

    def coefficient(self, num_experts: int, top_k: int) -> float:
        """See `Rescale.coefficient`."""
        return 1.0


RESCALES: Registry[Rescale] = Registry("rescale", Rescale, __name__)  # type: ignore[type-abstract]
