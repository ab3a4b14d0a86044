"""Granite-MoE with a shared expert: fused projections, four multipliers, biases on all of attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, Neurons, OutTensor, Router
from ..sources.base import DenseSpec, number
from .base import Target


class GraniteMoeShared(Target):
    """Holds Granite's multipliers, a bias on ``o_proj``, and an ungated shared expert of any width."""

    name = "granitemoeshared"
    architecture = "GraniteMoeSharedForCausalLM"
    summary = "softmax over the selected experts, ungated shared expert of any width, multipliers, attention biases"
    reference = "arXiv:2408.13359"
    shared = "any"
    holds = frozenset({"no_qk_norm", "qkv_bias", "o_bias", "head_dim", "multipliers", "logits_scaling"})
    needs_five = frozenset({"head_dim"})
    ffn_modules = ("block_sparse_moe", "shared_mlp")

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`. ``num_experts`` is for TRL, which reads it from every mixture of experts."""
        scale = dense.head_dim**-0.5 if dense.attention_multiplier is None else dense.attention_multiplier
        return {
            "intermediate_size": layout.expert_width,
            "num_local_experts": layout.num_experts,
            "num_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "shared_intermediate_size": layout.shared_width,
            "attention_bias": dense.qkv_bias,
            "attention_multiplier": scale,
            "embedding_multiplier": dense.embedding_multiplier,
            "residual_multiplier": dense.residual_multiplier,
            "logits_scaling": dense.logits_scaling,
            "router_aux_loss_coef": 0.001,
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        bias = bool(config.get("attention_bias"))
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        return {"qkv_bias": bias, "o_bias": bias} | {name: number(config, name, 1.0) for name in names}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`: all experts of a layer in one tensor, gate rows above up rows."""
        block = f"model.layers.{layer}.block_sparse_moe."
        hidden, width, experts = dense.hidden_size, layout.expert_width, layout.num_experts
        yield OutTensor(block + "router.layer.weight", (experts, hidden), "router", Router(), layer)
        yield OutTensor(
            block + "input_linear.weight", (experts, 2 * width, hidden), "routed", Neurons("gate_up", "all"), layer
        )
        down = Neurons("down", "all", layout.combine.bake)
        yield OutTensor(block + "output_linear.weight", (experts, hidden, width), "routed", down, layer)
        yield from self.shared_tensors(dense, layout, layer)

    def shared_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """Yield the shared expert of one layer, if there is one."""
        hidden, shared = dense.hidden_size, layout.shared_width
        if not shared:
            return
        prefix, gate_up = f"model.layers.{layer}.shared_mlp.", Neurons("gate_up", "shared")
        yield OutTensor(prefix + "input_linear.weight", (2 * shared, hidden), "shared", gate_up, layer)
        yield OutTensor(prefix + "output_linear.weight", (hidden, shared), "shared", Neurons("down", "shared"), layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        found = []
        if dense.qkv_bias or not dense.plain_head_dim:
            found.append(
                "vLLM's granitemoeshared has no attention biases and no head_dim: this file will not run there"
            )
        if dense.rope["rope_type"] != "default":
            found.append("SGLang ignores rope scaling for granitemoe: long contexts differ there")
        return found
