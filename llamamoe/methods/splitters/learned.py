"""Learn assignment and router together, layer by layer, by distilling the dense FFN."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from pydantic import Field

from ...lazy import np, torch
from ...numerics import check_finite
from ..layer import FfnWeights, LayerContext, Partition, TokenWeighting, token_scales
from ..routers.ridge import Ridge
from ..solvers.learned_assignment import LearningOptions
from ..solvers.normal_equations import held_out_tokens
from .base import Splitter, routed_neurons


class Learned(Splitter):
    """Minimises ``mean_t s_t^2 ||y_t - y~_t||^2`` over assignment logits A ``[F - S, N]`` and router rows R ``[N, H]``.

    ``y~ = shared neurons + sum_i z_i(x) E_i(x)``, with z 1 for the k largest of ``R x`` and 0 else, and E_i the sum of
    the parent's neurons in expert i. The layer runs with hard choices and straight-through gradients:

    * neurons: the exact balanced assignment of A forward (recomputed every ``refresh`` steps), the balanced transport
      plan ``Sinkhorn(A / tau)`` backward, tau falling from ``tau_start`` to ``tau_end``;
    * tokens: the k largest logits forward, ``sigmoid((R x - b) / temperature)`` with the threshold b that makes the
      sum k backward.

    The start is the result of `TokenClusters` and `Ridge` with their default options. A fifth of the tokens is held
    out; of the start and ``checks`` later states, the one with the least error on them is kept. On these it is thus
    never worse than its start.

    DOT-MoE trains through the whole model (KL to the teacher, cross-entropy, z-loss); here every layer is its own
    problem with one decoder layer in memory, the weights stay the parent's and the only backward pass is the
    FFN's own. ToMoE learns masks by a hypernetwork with Gumbel noise; here only mini-batches are sampled.
    """

    name = "learned"
    summary = (
        "assignment and router learned together by distilling each dense FFN: balanced transport, straight-through"
    )
    reference = "after DOT-MoE (arXiv:2606.01666) and ToMoE (arXiv:2501.15316), layer by layer"
    needs = "activations"
    default_rescale = "unit"
    default_router = "hidden_centroid"
    default_shared = 0.25
    default_shared_by = "power"
    default_repair = "least_squares"

    class Options(LearningOptions):
        """Options of `Learned`."""

        checks: int = Field(
            4, ge=1, description="Number of states compared on held-out tokens, in addition to the start."
        )
        weighting: TokenWeighting = Field(
            "residual", description="residual: errors count relative to the token's residual stream."
        )

    options: Options

    def split(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        """See `Splitter.split`; the learned rows come with the partition.

        O((F - S)(H + N)) for each of ``steps`` x ``batch`` tokens, forward and backward: about 10 H (F - S)
        floating-point operations; O((F - S) N^2) per step for the transport; the start and ``checks`` sweeps over a fifth of the
        tokens. Memory: the routed weights in the compute dtype, and some ``batch`` x (F - S) floats.

        Raises:
            LlamaMoeError: An activation is NaN or infinite.
        """
        start = self._start(ffn, shared, context)
        neurons = routed_neurons(ffn.intermediate_size, shared)
        held_out_T = held_out_tokens(context.inputs.num_tokens)
        fit, held_out = (t.nonzero().flatten() for t in (~held_out_T, held_out_T))
        if context.top_k >= context.num_experts or not self.options.steps or not len(held_out) or not len(neurons):
            return start
        labels, rows = self._learn(ffn, neurons, start, fit, held_out, context)
        return replace(Partition.from_labels(neurons, labels, context, shared), router_NH=rows.float().cpu())

    def training_flops(self, places: int, hidden_size: int, tokens: int) -> int:
        """See `Plugin.training_flops`: mini-batches of the four fifths that are not held out, with frozen weights."""
        batch = min(self.options.batch, 4 * tokens // 5)
        return self.options.steps * batch * (6 + 4) * places * hidden_size

    @classmethod
    def working_bytes(cls, intermediate_size: int, hidden_size: int) -> int:
        """See `Splitter.working_bytes`: the start's, or the weights, activations and gradients of one mini-batch."""
        from .token_clusters import TokenClusters

        batch = cls.Options().batch
        own = 4 * (3 * intermediate_size * hidden_size + 6 * batch * intermediate_size + 4 * batch * hidden_size)
        return max(own, TokenClusters.working_bytes(intermediate_size, hidden_size))

    def _start(self, ffn: FfnWeights, shared: np.ndarray, context: LayerContext) -> Partition:
        from .token_clusters import TokenClusters

        partition = TokenClusters().split(ffn, shared, context)
        return replace(partition, router_NH=Ridge().rows(ffn, partition, context))

    def _learn(
        self,
        ffn: FfnWeights,
        neurons: np.ndarray,
        start: Partition,
        fit: torch.Tensor,
        held_out: torch.Tensor,
        context: LayerContext,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Return labels int64 ``[R]`` and rows ``[N, H]`` of the state with the least held-out error."""
        from ..solvers.learned_assignment import Learner, RoutedNeurons, first_logits, mean_error

        options, inputs, rows = self.options, context.inputs, start.router_NH
        assert rows is not None
        part = RoutedNeurons.of(ffn, neurons, inputs, token_scales(inputs, options.weighting))
        labels = labels_of(start, neurons)
        best = least = mean_error(part, labels, rows, context.top_k, held_out)
        check_finite(context.layer, torch.tensor(least))
        if least == 0:
            return labels, rows
        learner = Learner(
            part=part,
            context=context,
            settings=options,
            logits_RN=first_logits(self._captured(ffn, neurons, rows, context), labels, inputs.device),
            rows_NH=rows.to(inputs.device, torch.float32, copy=True),
            unit=least,
            generator=torch.Generator().manual_seed(int(context.rng("learned").integers(2**63))),
            labels_R=labels,
        )
        steps = [options.steps * i // options.checks for i in range(options.checks + 1)]
        for first, last in pairwise(steps):
            learner.run(fit, first, last)
            found = mean_error(part, learner.labels_R, learner.rows_NH.detach(), context.top_k, held_out)
            if found < best:
                best, labels, rows = found, learner.labels_R, learner.rows_NH.detach().clone()
        return labels, rows

    def _captured(
        self, ffn: FfnWeights, neurons: np.ndarray, rows_NH: torch.Tensor, context: LayerContext
    ) -> np.ndarray:
        from .token_clusters import captured_power

        inputs = context.inputs
        moved = rows_NH.to(inputs.device)
        logits = (x_BH.float() @ moved.T for x_BH in inputs.inputs())
        return captured_power(ffn, neurons, logits, token_scales(inputs, self.options.weighting), context)


def labels_of(partition: Partition, neurons: np.ndarray) -> np.ndarray:
    """Return int64 ``[R]``: the expert of each of the routed neurons (ascending)."""
    labels: np.ndarray = partition.places()[neurons]
    return labels
