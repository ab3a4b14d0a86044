"""Qwen3-MoE: per-head norms on queries and keys, no shared expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, OutTensor, Router, expert_tensors
from ..sources.base import DenseSpec, positive
from .base import Target


class Qwen3Moe(Target):
    """For Qwen3-like sources; supported by most runtimes."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    summary = "softmax routing, norms on queries and keys, no shared expert"
    reference = "arXiv:2505.09388"
    weightings = ("renormalised", "softmax")
    dense_layers = "any"
    holds = frozenset({"qk_norm", "qkv_bias", "o_bias", "head_dim", "window"})

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`. Transformers 4 reads ``num_experts``, 5 also accepts ``num_local_experts``."""
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": layout.expert_width,
            "num_experts": layout.num_experts,
            "num_local_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "norm_topk_prob": layout.combine.weighting == "renormalised",
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(layout.dense_layers),
            "attention_bias": dense.qkv_bias,
            "use_sliding_window": dense.window is not None,
            "sliding_window": dense.window,
            "max_window_layers": dense.num_layers,
            "router_aux_loss_coef": 0.001,
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        bias = bool(config.get("attention_bias"))
        sliding = (window,) * positive(config, "num_hidden_layers")
        return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "heads", "sliding": sliding}

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """See `Target.one_layer`."""
        return {"mlp_only_layers": [0] if dense else []}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.mlp."
        yield OutTensor(block + "gate.weight", (layout.num_experts, dense.hidden_size), "router", Router(), layer)
        yield from expert_tensors(block, dense.hidden_size, layout, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        if layout.combine.weighting == "renormalised":
            return []
        return [
            "llama.cpp always renormalises qwen3_moe routing, so a GGUF of this file would scale the experts by N/k"
        ]
