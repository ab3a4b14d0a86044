"""FlexOlmo: OLMo 2 with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, OutTensor, Router, expert_tensors
from ..sources.base import DenseSpec
from .base import Target


class FlexOlmo(Target):
    """Norms follow attention and FFN, so that experts and router read the residual stream as it is."""

    name = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    summary = "softmax routing, norms after attention and FFN, no shared expert"
    reference = "arXiv:2507.07024"
    weightings = ("renormalised", "softmax")
    holds = frozenset({"whole_qk_norm", "post_norm", "qkv_bias", "o_bias", "head_dim"})

    def refusals(self, dense: DenseSpec) -> list[str]:
        """See `Target.refusals`: it always has its norms."""
        reasons = super().refusals(dense)
        if not dense.post_norm:
            reasons.append("flex_olmo cannot hold norms before attention and FFN (it has them after)")
        return reasons

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        return {
            "intermediate_size": layout.expert_width,
            "num_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "norm_topk_prob": layout.combine.weighting == "renormalised",
            "attention_bias": dense.qkv_bias,
            "router_aux_loss_coef": 0.01,
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        bias = bool(config.get("attention_bias"))
        return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "whole", "post_norm": True}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.mlp."
        yield OutTensor(block + "gate.weight", (layout.num_experts, dense.hidden_size), "router", Router(), layer)
        yield from expert_tensors(block, dense.hidden_size, layout, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        return ["flex_olmo runs in transformers: mlx-lm, mistral.rs and export-gguf refuse it"]
