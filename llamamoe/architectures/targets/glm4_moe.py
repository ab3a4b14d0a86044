"""GLM-4-MoE: sigmoid routing with a correction bias and a scaling factor, ungated shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import CorrectionBias, MoeLayout, OutTensor, Router, expert_tensors, shared_tensors
from ..sources.base import DenseSpec, number, rope_parameters
from .base import Target


class Glm4Moe(Target):
    """Holds norms on queries and keys, any head_dim, partial rotary, shared experts and loss-free balancing.

    The factor of the routed experts is in the configuration (``routed_scaling_factor``), not baked into weights, so
    every weight keeps its bits. The head is untied: mlx-lm always reads ``lm_head.weight``, and vLLM ignores
    ``tie_word_embeddings`` and runs with a head that was never loaded.
    """

    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    summary = "sigmoid routing with correction bias, shared experts of m expert widths, factor kept in the config"
    reference = "arXiv:2508.06471"
    weightings = ("renormalised", "sigmoid")
    scaling_knob = True
    shared = "multiple"
    dense_layers = "leading"
    unties = True
    holds = frozenset({"no_qk_norm", "qk_norm", "qkv_bias", "head_dim", "partial_rotary"})

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`. The rotary share defaults to one half there, so it is written at both levels."""
        rope = {**dense.rope, "partial_rotary_factor": dense.partial_rotary_factor}
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": layout.expert_width,
            "n_routed_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "n_shared_experts": layout.shared_width // layout.expert_width,
            "first_k_dense_replace": len(layout.dense_layers),
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": layout.combine.weighting == "renormalised",
            "routed_scaling_factor": layout.combine.factor,
            "attention_bias": dense.qkv_bias,
            "use_qk_norm": dense.qk_norm == "heads",
            "num_nextn_predict_layers": 0,
            "partial_rotary_factor": dense.partial_rotary_factor,
            "rope_parameters": rope,
        }

    def stub_width(self, layout_width: int) -> int:
        """See `Target.stub_width`: the shared width is a multiple of the expert's and cannot be zero."""
        return layout_width

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        rope = rope_parameters(config)
        partial = number(rope if "partial_rotary_factor" in rope else config, "partial_rotary_factor", 0.5)
        rope.pop("partial_rotary_factor", None)
        return {
            "qkv_bias": bool(config.get("attention_bias")),
            "qk_norm": "heads" if config.get("use_qk_norm") else "",
            "partial_rotary_factor": partial,
            "rope": rope,
        }

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """See `Target.one_layer`."""
        return {"first_k_dense_replace": int(dense)}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.mlp."
        hidden, experts = dense.hidden_size, layout.num_experts
        yield OutTensor(block + "gate.weight", (experts, hidden), "router", Router(), layer)
        yield OutTensor(block + "gate.e_score_correction_bias", (experts,), "router", CorrectionBias(), layer, "F32")
        yield from expert_tensors(block, hidden, layout, layer)
        yield from shared_tensors(block + "shared_experts.", hidden, layout, self.shared_bake, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        found = [
            "llama.cpp's converter expects GLM's own tokenizer for glm4_moe; this one will not convert",
            "transformers' glm4_moe has no auxiliary loss: other trainers leave its router unbalanced "
            "(llamamoe pretrain has its own losses, and balances by the correction bias)",
        ]
        found += self.head_notes(dense)
        if not layout.num_shared:
            found.append(
                f"glm4_moe requires a shared expert: one of zeros and width {layout.shared_width} is written and costs its multiply-adds"
            )
        return found
