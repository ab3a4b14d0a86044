"""HunYuan V1 with experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, OutTensor, Router, expert_tensors, shared_tensors
from ..sources.base import DenseSpec
from .base import Target


class HunYuanV1Moe(Target):
    """Norms on queries and keys follow their rotary positions; one shared expert is as wide as a routed one."""

    name = "hunyuan_v1_moe"
    architecture = "HunYuanMoEV1ForCausalLM"
    summary = "softmax over the selected experts and one shared expert of their width, for HunYuan V1"
    reference = "arXiv:2411.02265"
    shared = "one"
    top_k_key = "moe_topk"
    holds = frozenset({"turned_qk_norm", "qkv_bias", "o_bias", "head_dim"})

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`. The last four keys are for other programs, which read them from HunYuan's own files."""
        return {
            "intermediate_size": layout.expert_width,
            "num_experts": layout.num_experts,
            "moe_topk": layout.top_k,
            "attention_bias": dense.qkv_bias,
            "use_qk_norm": True,
            "use_mixed_mlp_moe": True,
            "num_shared_expert": 1,
            "moe_intermediate_size": layout.expert_width,
        }

    def stub_width(self, layout_width: int) -> int:
        """See `Target.stub_width`: there is always a shared expert, as wide as a routed one."""
        return layout_width

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        bias = bool(config.get("attention_bias"))
        return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "turned"}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.mlp."
        yield OutTensor(block + "gate.wg.weight", (layout.num_experts, dense.hidden_size), "router", Router(), layer)
        yield from expert_tensors(block, dense.hidden_size, layout, layer)
        yield from shared_tensors(block + "shared_mlp.", dense.hidden_size, layout, self.shared_bake, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        found = [
            "hunyuan_v1_moe runs in transformers: mistral.rs computes other logits without an error, mlx-lm and export-gguf "
            "refuse it",
            "transformers' hunyuan_v1_moe has no auxiliary loss: other trainers leave its router unbalanced",
        ]
        if not layout.num_shared:
            found.append(
                f"hunyuan_v1_moe requires a shared expert: one of zeros and width {layout.shared_width} is written and costs its "
                "multiply-adds"
            )
        return found
