"""Mixtral: renormalised softmax routing, no shared expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, OutTensor, Router, expert_tensors
from ..sources.base import DenseSpec, positive
from .base import Target


class Mixtral(Target):
    """The most widely supported architecture for Llama-like sources without shared neurons."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    summary = "softmax over the selected experts, no shared expert; widest support by runtimes"
    reference = "arXiv:2401.04088"
    holds = frozenset({"no_qk_norm", "head_dim", "window"})

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        return {
            "intermediate_size": layout.expert_width,
            "num_local_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "sliding_window": dense.window,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        return {"sliding": (config.get("sliding_window"),) * positive(config, "num_hidden_layers")}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.block_sparse_moe."
        yield OutTensor(block + "gate.weight", (layout.num_experts, dense.hidden_size), "router", Router(), layer)
        yield from expert_tensors(block, dense.hidden_size, layout, layer, ("w1", "w3", "w2"))

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        if dense.window is None:
            return []
        return [f"vLLM ignores mixtral's sliding window ({dense.window}): longer contexts differ there"]
