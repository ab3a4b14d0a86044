"""Qwen2-MoE: softmax routing, one shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from ..moe_layout import NEARLY_ZERO, Constant, MoeLayout, OutTensor, Router, Weighting, expert_tensors, shared_tensors
from ..sources.base import DenseSpec, layer_shapes, positive, windows_by_type
from .base import Target


class Qwen2Moe(Target):
    """Shared neurons of any width for Llama-like sources.

    The shared expert's gate is written as almost zeros: its sigmoid is one half, exactly, so the shared down projection
    is doubled. Biases of q, k and v are always written (zeros if the source has none), because vLLM expects them. The
    head is untied, because SGLang and llama.cpp expect one.
    """

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    summary = "softmax routing and a shared expert of any width (its sigmoid gate is fixed at one half)"
    reference = "arXiv:2407.10671"
    weightings: ClassVar[tuple[Weighting, ...]] = ("renormalised", "softmax")
    shared = "any"
    dense_layers: ClassVar[Literal["none", "any"]] = "any"
    shared_bake = 2.0
    unties = True
    holds = frozenset({"no_qk_norm", "qkv_bias", "head_dim", "window", "mixed_windows"})
    needs_five = frozenset({"head_dim", "mixed_windows"})

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        window = next((w for w in dense.sliding if w is not None), None)
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": layout.expert_width,
            "shared_expert_intermediate_size": layout.shared_width,
            "num_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "norm_topk_prob": layout.combine.weighting == "renormalised",
            "qkv_bias": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(layout.dense_layers),
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": dense.num_layers,
            "layer_types": dense.layer_types,
            "router_aux_loss_coef": 0.001,
        }

    def stub_width(self, layout_width: int) -> int:
        """See `Target.stub_width`: zero-sized tensors break runtimes, 32 is one quantisation block."""
        return 32

    def attention_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.attention_tensors`."""
        yield from super().attention_tensors(dense, layout, layer)
        if not dense.qkv_bias:
            shapes = layer_shapes(dense, layer)
            for name in ("q_proj", "k_proj", "v_proj"):
                rows = shapes[f"self_attn.{name}.weight"][0]
                yield OutTensor(f"model.layers.{layer}.self_attn.{name}.bias", (rows,), "attention", Constant(), layer)

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        layers = positive(config, "num_hidden_layers")
        return {"qkv_bias": True, "sliding": windows_by_type(config, layers, 4096)}

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """See `Target.one_layer`."""
        return {"mlp_only_layers": [0] if dense else []}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.mlp."
        hidden = dense.hidden_size
        yield OutTensor(block + "gate.weight", (layout.num_experts, hidden), "router", Router(), layer)
        yield from expert_tensors(block, hidden, layout, layer)
        yield from shared_tensors(block + "shared_expert.", hidden, layout, self.shared_bake, layer)
        yield OutTensor(block + "shared_expert_gate.weight", (1, hidden), "router", Constant(NEARLY_ZERO), layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        found = []
        if layout.combine.weighting == "renormalised":
            found.append(
                "llama.cpp and mlx-lm never renormalise qwen2_moe's routing and do not warn: there the experts would be "
                "scaled by k/N. For the same result everywhere: --target granitemoeshared (llama.cpp) or glm4_moe (mlx-lm)"
                + (", or --rescale unit" if layout.copies == 1 else "")
            )
        if layout.num_experts:
            found.append(
                "mlx-lm rounds qwen2_moe's router probabilities to the model's dtype before it selects: in bfloat16 a hard "
                "router's experts tie there (run it in float32, or take --target glm4_moe)"
            )
        found += self.head_notes(dense)
        if dense.rope["rope_type"] == "llama3":
            found.append(
                "llama.cpp drops llama3 rope scaling for qwen2_moe: contexts past the original length differ there"
            )
        if layout.dense_layers:
            found.append(
                "SGLang and llama.cpp treat every layer of qwen2_moe as MoE: layers kept dense do not load there"
            )
        return found
