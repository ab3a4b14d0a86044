"""Measure routers against an oracle, and the outputs of shared and routed neurons, while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..lazy import torch
from ..methods.contributions import Contribution, OracleTally, contributions
from ..methods.layer import ExpertWeights, LayerInputs, Partition
from ..training.moe_layers import MoeLayer
from ..training.routing import Routing
from .text import TextBatch

MOST_GRAM = 1 << 28
"""Maximum number of elements of a layer's Gram matrices: 1 GiB."""


class OracleCollector:
    """A comparison of the experts that a router selects with those that contribute most.

    The contribution is ``||E_i(x)||^2`` (see `llamamoe.methods.contributions.contributions`): all experts of a layer
    run for the evaluated tokens, with a float32 copy of its weights and ``N W^2`` numbers; if those would be more than
    `MOST_GRAM`, the power of the neurons is used instead, which ignores how they add up. For experts of attention it is
    measured by `HeadContributions`.

    Args:
        layers: The model's MoE layers.
        hidden_act: Name of the experts' activation.
        tokens: Number of tokens per domain.
    """

    def __init__(self, layers: Sequence[MoeLayer], hidden_act: str, tokens: int) -> None:
        self._act, self._most = hidden_act, tokens
        self._tallies = {moe.place: OracleTally(moe.num_experts, moe.top_k) for moe in layers}
        self._seen: dict[str, int] = {}

    def wants(self, domain: str) -> bool:
        """Return whether more tokens of a domain are needed."""
        return self._seen.get(domain, 0) < self._most

    def add(self, batch: TextBatch, routings: Sequence[Routing], heads: Mapping[int, torch.Tensor]) -> None:
        """Add the first tokens of a batch; the routings must include their routers' inputs.

        Args:
            batch: The tokens.
            routings: Of every layer, for all places of the batch.
            heads: By layer, the contributions of attention experts ``[T, N]`` for the same places.
        """
        real = batch.real_BT.flatten().to(routings[0].logits_TN.device).nonzero().flatten()
        real = real[: self._most - self._seen.get(batch.domain, 0)]
        self._seen[batch.domain] = self._seen.get(batch.domain, 0) + len(real)
        for each in routings:
            assert each.inputs_TH is not None
            attends = each.moe.part == "attention"
            score_TN = heads[each.moe.layer][real] if attends else self._score(each.moe, each.inputs_TH[real])
            chosen_TN = torch.zeros_like(score_TN, dtype=torch.bool).scatter_(1, each.indices_Tk[real], True)
            self._tallies[each.moe.place].add(score_TN, chosen_TN)

    def _score(self, moe: MoeLayer, x_TH: torch.Tensor) -> torch.Tensor:
        inputs = LayerInputs(x_TH.cpu(), torch.ones(len(x_TH)), x_TH.device, x_TH.dtype)
        weights, partition = _weights(moe)
        wide = moe.num_experts * partition.experts.shape[1] ** 2 > MOST_GRAM
        kind: Contribution = "power" if wide else "norm"
        return torch.cat(list(contributions(weights, partition, inputs, kind=kind, hidden_act=self._act)))

    def of_layer(self, moe: MoeLayer) -> dict[str, float | None]:
        """Return the report's values of one layer."""
        tally = self._tallies[moe.place]
        if not tally.contributes:
            return {"recall_at_k": None, "chance_recall": tally.chance, "captured": None, "captured_by_chance": None}
        quality = tally.quality()
        return {key: quality[key] for key in ("recall_at_k", "chance_recall", "captured", "captured_by_chance")}


def _weights(moe: MoeLayer) -> tuple[ExpertWeights, Partition]:
    """Return the routed experts of a live layer, place by place. Factors common to all experts do not matter."""
    gate_up_NRH, down_NHW, _ = moe.expert_weights()
    num_experts, width = down_NHW.shape[0], down_NHW.shape[2]
    gate_NWH, up_NWH = gate_up_NRH.detach().float().chunk(2, dim=1)
    down_HP = down_NHW.detach().float().permute(1, 0, 2).flatten(1)
    partition = Partition(
        np.arange(num_experts * width, dtype=np.int64).reshape(num_experts, width),
        np.empty(0, np.int64),
        np.empty(0, np.int64),
    )
    return ExpertWeights(gate_NWH.flatten(0, 1), up_NWH.flatten(0, 1), down_HP), partition


class HeadContributions:
    """The contributions ``||o_n a_n||^2`` of all experts of attention, of which the model itself computes the selected ones.

    Every attention runs a second time with all of its experts: O(T N H) memory for one layer.

    Args:
        model: The model.
        layers: Its MoE layers; those of FFNs are left out.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[MoeLayer]) -> None:
        modules = dict(model.named_modules())
        self._layers = [(moe, modules[moe.name.rpartition(".")[0]]) for moe in layers if moe.part == "attention"]

    @contextmanager
    def listening(self, *, wanted: bool) -> Iterator[dict[int, torch.Tensor]]:
        """Measure one forward pass, if wanted; the yielded contributions by layer, float32 ``[T, N]``, are then filled."""
        found: dict[int, torch.Tensor] = {}
        layers = self._layers if wanted else []
        handles = [each.register_forward_pre_hook(_measure(moe, found), with_kwargs=True) for moe, each in layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _measure(moe: MoeLayer, found: dict[int, torch.Tensor]) -> Any:
    """Return a hook that runs an attention with all experts before it runs as it is, so that a tap keeps the latter."""

    def measure(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept: dict[str, Any] = {}
        block: Any = moe.block
        watched = {"router": moe.router, "outputs": block.output_linear}
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: kept.update({name: output}))
            for name, module in watched.items()
        ]
        selecting = (attention, block, moe.router)
        try:
            for module in selecting:
                module.top_k = moe.num_experts
            attention.forward(*args, **kwargs)
        finally:
            for module in selecting:
                module.top_k = moe.top_k
            for handle in handles:
                handle.remove()
        token_M = kept["router"][1]  # expert by expert, each with all tokens
        expert_M = torch.arange(moe.num_experts, device=token_M.device).repeat_interleave(
            len(token_M) // moe.num_experts
        )
        power_M = kept["outputs"].float().square().sum(1)
        found[moe.layer] = power_M.new_empty(len(token_M) // moe.num_experts, moe.num_experts)
        found[moe.layer][token_M, expert_M] = power_M

    return measure


def query_heads(groups: int, num_experts: int) -> list[list[int]]:
    """Return the query heads of the dense model in each expert of attention: one of each of the key/value heads."""
    return [[group * num_experts + expert for group in range(groups)] for expert in range(num_experts)]


class OutputNorms:
    """Mean norms of the outputs of shared and routed neurons, as shares of the FFN's.

    JetMoE, whose FFNs share no neurons and whose experts are no module, is left out.

    Args:
        model: The model.
        layers: Its MoE layers.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[MoeLayer]) -> None:
        self._layers = [moe for moe in layers if hasattr(moe.block, "experts")]
        self._modules = dict(model.named_modules())
        self._sums = {moe.layer: np.zeros(3) for moe in layers}
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._real_T: torch.Tensor | None = None

    @contextmanager
    def listening(self, batch: TextBatch) -> Iterator[None]:
        """Sum up the norms of one forward pass over a batch."""
        self._real_T = batch.real_BT.flatten()
        handles = []
        for moe in self._layers:
            self._kept[moe.layer] = {}
            handles.append(moe.experts.register_forward_hook(self._hook(moe.layer, "routed")))
            handles.append(moe.block.register_forward_hook(self._hook(moe.layer, "block")))
            beside = self._modules.get(moe.name.rpartition(".")[0] + ".shared_mlp")
            if beside is not None:  # granitemoeshared adds it outside the block
                handles.append(beside.register_forward_hook(self._hook(moe.layer, "beside")))
        try:
            yield
            for moe in self._layers:
                self._add(moe.layer)
        finally:
            self._kept = {}
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            assert self._real_T is not None
            self._kept[layer][name] = value.reshape(-1, value.shape[-1])[self._real_T.to(value.device)].float()

        return keep

    def _add(self, layer: int) -> None:
        kept = self._kept.pop(layer)
        routed, block = kept["routed"], kept["block"]
        shared = kept["beside"] if "beside" in kept else block - routed
        whole = block + kept["beside"] if "beside" in kept else block
        self._sums[layer] += [float(each.norm(dim=1).double().sum()) for each in (routed, shared, whole)]

    def of_layer(self, moe: MoeLayer) -> dict[str, float | None]:
        """Return the report's values of one layer, without a shared norm if nothing is shared."""
        routed, shared, whole = self._sums[moe.layer]
        if not whole:
            return {"routed_norm": None, "shared_norm": None}
        share = shared / whole
        return {"routed_norm": routed / whole, "shared_norm": share if share > 1e-3 else None}
