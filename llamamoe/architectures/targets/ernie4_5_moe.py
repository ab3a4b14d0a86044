"""ERNIE-4.5-MoE: softmax routing with a correction bias, ungated shared experts, interleaved rotary pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..moe_layout import CorrectionBias, MoeLayout, OutTensor, Router, expert_tensors, shared_tensors
from ..sources.base import DenseSpec
from .base import Target, leading


class Ernie45Moe(Target):
    """Rotary positions act on neighbouring rows in this architecture, so the rows of q and k are re-ordered (exact)."""

    name = "ernie4_5_moe"
    architecture = "Ernie4_5_MoeForCausalLM"
    summary = "softmax routing with correction bias, shared experts of m expert widths or none"
    reference = "ERNIE 4.5 technical report (Baidu, 2025)"
    shared = "multiple"
    dense_layers = "ends"
    top_k_key = "moe_k"
    holds = frozenset({"no_qk_norm", "head_dim"})

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`."""
        first = leading(layout.dense_layers)
        last = dense.num_layers - 1 - (len(layout.dense_layers) - first)
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": layout.expert_width,
            "moe_num_experts": layout.num_experts,
            "moe_k": layout.top_k,
            "moe_num_shared_experts": layout.shared_width // layout.expert_width,
            "moe_layer_start_index": first,
            "moe_layer_end_index": last,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
            "use_bias": False,
            "router_aux_loss_coef": 0.001,
        }

    def turns_neighbours(self, dense: DenseSpec) -> bool:
        """See `Target.turns_neighbours`."""
        return True

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """See `Target.one_layer`."""
        return {"moe_layer_start_index": int(dense), "moe_layer_end_index": int(dense)}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`. Transformers keeps the router in float32, so it is stored so."""
        block = f"model.layers.{layer}.mlp."
        hidden, experts = dense.hidden_size, layout.num_experts
        yield OutTensor(block + "gate.weight", (experts, hidden), "router", Router(), layer, "F32")
        yield OutTensor(
            block + "moe_statics.e_score_correction_bias", (1, experts), "router", CorrectionBias(), layer, "F32"
        )
        yield from expert_tensors(block, hidden, layout, layer)
        if layout.shared_width:
            yield from shared_tensors(block + "shared_experts.", hidden, layout, self.shared_bake, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        return [
            "llama.cpp's ernie4_5_moe needs a SentencePiece tokenizer and a fixed shared width; check before converting to GGUF"
        ]
