"""Qwen3-MoE: per-head norms on queries and keys, no shared expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ..moe_layout import MoeLayout, Neurons, OutTensor, Router, Weighting, expert_tensors
from ..sources.base import DenseSpec, positive
from .base import Target


class Qwen3Moe(Target):
    """For Qwen3-like sources; supported by most runtimes."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    summary = "softmax routing, norms on queries and keys, no shared expert"
    reference = "arXiv:2505.09388"
    weightings: ClassVar[tuple[Weighting, ...]] = ("renormalised", "softmax")
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

    def inside(self, whole: str) -> Target:
        """See `Target.inside`."""
        return Qwen3VlMoe() if whole == "qwen3_vl" else self

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


class Qwen3VlMoe(Qwen3Moe):
    """Qwen3-MoE as the text model of Qwen3-VL-MoE, which always renormalises and has all experts of a layer in one tensor."""

    weightings: ClassVar[tuple[Weighting, ...]] = ("renormalised",)

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`: rows and columns are exchanged, as in Qwen's own files."""
        block = f"model.layers.{layer}.mlp."
        hidden, width, experts = dense.hidden_size, layout.expert_width, layout.num_experts
        yield OutTensor(block + "gate.weight", (experts, hidden), "router", Router(), layer)
        gate_up = Neurons("gate_up", "all", turned=True)
        yield OutTensor(block + "experts.gate_up_proj", (experts, hidden, 2 * width), "routed", gate_up, layer)
        down = Neurons("down", "all", layout.combine.bake, turned=True)
        yield OutTensor(block + "experts.down_proj", (experts, width, hidden), "routed", down, layer)

    def layout_refusals(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.layout_refusals`."""
        if dense.hidden_size not in (layout.expert_width, 2 * layout.expert_width):
            return []
        return [
            f"experts of {layout.expert_width} neurons have square matrices beside a hidden size of {dense.hidden_size}: transformers "
            "could not tell their rows from their columns in qwen3_vl_moe (take another --experts)"
        ]
