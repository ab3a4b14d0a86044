"""Granite-MoE with windows and rotary positions by layer: attention sinks are closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import Constant, MoeLayout, Neurons, OutTensor, Router
from ..sources.base import DenseSpec, positive
from .granitemoeshared import GraniteMoeShared

CLOSED_SINK = -1e4
"""The logit of an attention sink that takes no weight: its sigmoid is exactly 0 beside any other logit."""


class GraniteMoeSwa(GraniteMoeShared):
    """Holds what GraniteMoeShared does, layers without rotary positions, and windows in all layers or in some.

    Attention always has a learnable sink per head; its logit is written so low that it takes no weight.
    """

    name = "granitemoe_swa"
    architecture = "GraniteMoeSWAForCausalLM"
    summary = "granitemoeshared with attention windows and rotary positions by layer (transformers 5 only)"
    reference = "https://huggingface.co/ibm-granite"
    holds = GraniteMoeShared.holds | {"window", "mixed_windows", "no_rope"}
    needs_five = frozenset()
    only_five = True

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`.

        A base of 0 stands for a layer without rotary positions. Transformers builds a mask for ``sliding_window`` even
        if no layer uses it, so there is always one.
        """
        theta = float(dense.rope["rope_theta"])
        return super().config(dense, layout) | {
            "sliding_window": next(filter(None, dense.sliding), dense.max_position_embeddings),
            "layer_types": dense.layer_types,
            "layer_rope_theta": [0.0 if layer in dense.no_rope else theta for layer in range(dense.num_layers)],
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        window, types = config.get("sliding_window"), config["layer_types"]
        bases = config.get("layer_rope_theta") or [1.0] * positive(config, "num_hidden_layers")
        return super().attention_spec(config) | {
            "sliding": tuple(window if kind == "sliding_attention" else None for kind in types),
            "no_rope": tuple(layer for layer, base in enumerate(bases) if not base),
        }

    def attention_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.attention_tensors`."""
        yield from super().attention_tensors(dense, layout, layer)
        name = f"model.layers.{layer}.self_attn.sinks"
        yield OutTensor(name, (dense.num_heads,), "attention", Constant(CLOSED_SINK), layer)

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`: all experts of a layer in one tensor, under the names that memory has, too."""
        block = f"model.layers.{layer}.block_sparse_moe."
        hidden, width, experts = dense.hidden_size, layout.expert_width, layout.num_experts
        yield OutTensor(block + "router.weight", (experts, hidden), "router", Router(), layer)
        gate_up, down = Neurons("gate_up", "all"), Neurons("down", "all", layout.combine.bake)
        yield OutTensor(block + "experts.gate_up_proj", (experts, 2 * width, hidden), "routed", gate_up, layer)
        yield OutTensor(block + "experts.down_proj", (experts, hidden, width), "routed", down, layer)
        yield from self.shared_tensors(dense, layout, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        return [
            "granitemoe_swa runs in transformers 5: mlx-lm, mistral.rs and export-gguf refuse it, and vLLM was not tried",
            "transformers computes granitemoe_swa's attention without sdpa: long contexts take more time and memory",
        ]
