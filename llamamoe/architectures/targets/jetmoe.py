"""JetMoE: attention is a mixture of experts, too, with a router of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import Constant, Copy, Heads, MoeLayout, Neurons, Origin, OutTensor, Router, Stack
from ..sources.base import DenseSpec, positive
from .base import Target

EPSILON = 1e-6
"""Epsilon of the norms in its layers, which ignore ``rms_norm_eps``."""


class JetMoe(Target):
    """Grouped query attention as experts: one query head of each key/value head, with its slice of the output.

    N and k are the same in attention and FFN; keys and values are shared by all experts. An RMSNorm of x with epsilon e
    equals that of c x with epsilon c^2 e: where the source's is not 1e-6, the residual stream is scaled, that is the
    embeddings and all outputs of attention and FFN.
    """

    name = "jetmoe"
    architecture = "JetMoeForCausalLM"
    summary = "attention is routed, too: experts of one query head per key/value head; transformers only"
    reference = "arXiv:2404.07413"
    holds = frozenset({"no_qk_norm", "head_dim", "o_bias"})
    attention_experts = True
    derived = frozenset({"num_attention_heads"})

    def refusals(self, dense: DenseSpec) -> list[str]:
        """See `Target.refusals`: there must be several query heads to choose from."""
        reasons = super().refusals(dense)
        if dense.num_heads == dense.num_kv_heads:
            reasons.append(
                f"{self.name} cannot hold multi-head attention: its experts are the query heads of a key/value head, and here "
                "each has one"
            )
        return reasons

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        return {
            "intermediate_size": layout.expert_width,
            "num_local_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "kv_channels": dense.head_dim,
            "activation_function": dense.hidden_act,
            "rms_norm_eps": EPSILON,
            "aux_loss_coef": 0.001,
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        heads = positive(config, "num_key_value_heads") * positive(config, "num_local_experts")
        return {
            "num_heads": heads,
            "head_dim": positive(config, "kv_channels"),
            "hidden_act": config.get("activation_function"),
            "o_bias": True,
        }

    def residual_scale(self, dense: DenseSpec) -> float:
        """See `Target.residual_scale`."""
        return math.sqrt(EPSILON / dense.rms_norm_eps) if dense.rms_norm_eps else 1.0

    def fold(self, dense: DenseSpec) -> float:
        """See `Target.fold`."""
        return dense.embedding_multiplier * self.residual_scale(dense)

    def fold_reason(self, dense: DenseSpec) -> str:
        """See `Target.fold_reason`."""
        if dense.embedding_multiplier != 1.0:
            return super().fold_reason(dense)
        return f"has norms of epsilon {EPSILON:g} only, not {dense.rms_norm_eps:g}"

    def ties(self, dense: DenseSpec) -> bool:
        """See `Target.ties`."""
        return dense.tie_word_embeddings

    def norm_scale(self, dense: DenseSpec) -> float:
        """See `Target.norm_scale`: a tied head holds the embedding's factor, which is divided out here."""
        return 1.0 / self.fold(dense) if dense.tie_word_embeddings else 1.0

    def attention_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.attention_tensors`."""
        prefix = f"model.layers.{layer}."
        source, block = prefix + "self_attn.", prefix + "self_attention."
        hidden, groups, count = dense.hidden_size, dense.num_kv_heads, layout.num_experts
        width = groups * dense.head_dim
        norm = prefix + "input_layernorm.weight"
        yield OutTensor(norm, (hidden,), "norm", Copy(norm), layer)
        bias: Origin = Copy(source + "o_proj.bias", self.residual_scale(dense)) if dense.o_bias else Constant()
        yield OutTensor(block + "experts.bias", (hidden,), "attention", bias, layer)
        yield OutTensor(block + "experts.router.layer.weight", (count, hidden), "router", Router("attention"), layer)
        query = Heads("query", source + "q_proj.weight", groups, count)
        output = Heads("output", source + "o_proj.weight", groups, count, layout.combine.bake)
        for name, shape, origin in (("input", (width, hidden), query), ("output", (hidden, width), output)):
            name = f"{block}experts.{name}_linear.weight"
            yield OutTensor(name, (count, *shape), "routed_attention", origin, layer)
        both = Stack((source + "k_proj.weight", source + "v_proj.weight"))
        yield OutTensor(block + "kv_proj.weight", (2 * width, hidden), "attention", both, layer)
        norm = prefix + "post_attention_layernorm.weight"
        yield OutTensor(norm, (hidden,), "norm", Copy(norm), layer)

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`: all experts of a layer in one tensor, gate rows above up rows."""
        block = f"model.layers.{layer}.mlp."
        hidden, width, count = dense.hidden_size, layout.expert_width, layout.num_experts
        yield OutTensor(block + "bias", (hidden,), "shared", Constant(), layer)
        yield OutTensor(block + "router.layer.weight", (count, hidden), "router", Router(), layer)
        gate_up, down = Neurons("gate_up", "all"), Neurons("down", "all", layout.combine.bake)
        yield OutTensor(block + "input_linear.weight", (count, 2 * width, hidden), "routed", gate_up, layer)
        yield OutTensor(block + "output_linear.weight", (count, hidden, width), "routed", down, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        return ["llama.cpp, mlx-lm and mistral.rs do not run jetmoe, and vLLM has no class of it: use transformers"]
