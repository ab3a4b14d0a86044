"""Qwen3.5-MoE, the text model: gated delta networks in most layers, the FFN of Qwen2-MoE in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, OutTensor
from ..sources.base import DenseSpec, common
from ..sources.qwen3_5_text import hybrid_spec
from .base import Target
from .qwen2_moe import Qwen2Moe

HYBRID = frozenset(
    {"linear", "gated_attention", "zero_centred", "qk_norm", "qkv_bias", "o_bias", "head_dim", "partial_rotary"}
)
"""Features of a dense source that the layers around the FFNs compute."""


def hybrid_keys(dense: DenseSpec) -> dict[str, Any]:
    """Return the configuration keys of all layers around the FFNs, which Qwen3.5 and its mixture spell alike."""
    sizes = dense.linear.keys() if dense.linear else {}
    rope = {**dense.rope, "partial_rotary_factor": dense.partial_rotary_factor}
    bias = {"attention_bias": dense.qkv_bias}
    return sizes | bias | {"layer_types": dense.layer_types, "rope_parameters": rope, "rope_scaling": None}


class Qwen35MoeText(Qwen2Moe):
    """The shared expert's gate is written as almost zeros, as in Qwen2-MoE, so that its sigmoid is one half, exactly."""

    name = "qwen3_5_moe_text"
    architecture = "Qwen3_5MoeForCausalLM"
    summary = (
        "gated delta networks in most layers, softmax over the selected experts, shared expert (transformers 5 only)"
    )
    reference = "https://huggingface.co/Qwen/Qwen3.5-35B-A3B"
    weightings = ("renormalised",)
    dense_layers = "none"
    unties = False
    holds = HYBRID
    needs_five = frozenset()
    only_five = True

    def refusals(self, dense: DenseSpec) -> list[str]:
        """See `Target.refusals`: all three are always there."""
        reasons = super().refusals(dense)
        if dense.linear is None or not dense.gated_attention or not dense.zero_centred:
            reasons.append("qwen3_5_moe_text cannot hold attention without gates, or norms by w alone (it has 1 + w)")
        return reasons

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        return hybrid_keys(dense) | {
            "moe_intermediate_size": layout.expert_width,
            "shared_expert_intermediate_size": layout.shared_width,
            "num_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "router_aux_loss_coef": 0.001,
        }

    def dense_spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Target.dense_spec`: there is no dense FFN, and no key for its size."""
        return common(
            self.name, {**config, "intermediate_size": config["moe_intermediate_size"]}, **hybrid_spec(config)
        )

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """See `Target.one_layer`."""
        return {}

    def attention_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.attention_tensors`."""
        yield from Target.attention_tensors(self, dense, layout, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        return [
            "qwen3_5_moe_text runs in transformers 5: mlx-lm, mistral.rs and export-gguf refuse it, and vLLM was not tried"
        ]
