"""Cohere2-MoE: attention and experts side by side behind one norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..moe_layout import MoeLayout, OutTensor, Router, expert_tensors, shared_tensors
from ..sources.base import DenseSpec, number, positive
from .base import Target

NO_WINDOW = 1 << 30
"""An attention window larger than any context, for layers with full attention that have rotary positions."""


class Cohere2Moe(Target):
    """Router and experts read the norm that attention reads, and the outputs of both are added to the residual stream.

    Layers with a window have rotary positions, others none; full attention with rotary positions in all layers is written
    as a window that no context fills. These turn neighbouring rows, so that the rows of q and k
    are re-ordered (exact).
    """

    name = "cohere2_moe"
    architecture = "Cohere2MoeForCausalLM"
    summary = "softmax over the selected experts, attention and FFN side by side (transformers 5 only)"
    reference = "https://huggingface.co/CohereLabs/command-a-plus-05-2026"
    shared = "multiple"
    dense_layers = "any"
    only_five = True
    holds = frozenset(
        {"parallel", "layer_norm", "no_qk_norm", "qkv_bias", "o_bias", "head_dim", "window", "mixed_windows", "no_rope"}
        | {"logits_scaling"}
    )

    def refusals(self, dense: DenseSpec) -> list[str]:
        """See `Target.refusals`."""
        reasons = super().refusals(dense)
        if not dense.parallel:
            reasons.append("cohere2_moe cannot hold an FFN behind attention (it has both side by side)")
        elif not dense.turns_in_windows and not _turns_everywhere(dense):
            reasons.append(
                "cohere2_moe cannot hold rotary positions but in the layers that have a sliding window, or in all without any"
            )
        return reasons

    def config(self, dense: DenseSpec, layout: MoeLayout) -> dict[str, Any]:
        """See `Target.config`.

        There is always a window, because transformers builds a mask for it even if no layer has one. A pattern of
        windows in leading dense layers of 1 would give these rotary positions.
        """
        kept, everywhere = layout.dense_layers, _turns_everywhere(dense)
        return {
            "intermediate_size": layout.expert_width,
            "num_experts": layout.num_experts,
            "num_experts_per_tok": layout.top_k,
            "num_shared_experts": layout.shared_width // layout.expert_width,
            "shared_expert_combination_strategy": "sum",
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "mlp_layer_types": ["dense" if layer in kept else "sparse" for layer in range(dense.num_layers)],
            "prefix_dense_intermediate_size": dense.intermediate_size if kept else None,
            "prefix_dense_sliding_window_pattern": 4,
            "layer_norm_eps": dense.rms_norm_eps,
            "rms_norm_eps": None if dense.layer_norm else dense.rms_norm_eps,
            "logit_scale": 1.0 / dense.logits_scaling,
            "attention_bias": dense.qkv_bias,
            "sliding_window": NO_WINDOW
            if everywhere
            else next(filter(None, dense.sliding), dense.max_position_embeddings),
            "layer_types": ["sliding_attention"] * dense.num_layers if everywhere else dense.layer_types,
        }

    def attention_spec(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.attention_spec`."""
        bias, types, kinds = bool(config.get("attention_bias")), config["layer_types"], config["mlp_layer_types"]
        all_turn = config.get("prefix_dense_sliding_window_pattern", 1) == 1
        turned = [
            kind == "sliding_attention" or (ffn == "dense" and all_turn) for kind, ffn in zip(types, kinds, strict=True)
        ]
        layer_norm = config.get("rms_norm_eps") is None
        window = positive(config, "sliding_window") if "sliding_attention" in types else None
        window = None if window == NO_WINDOW else window
        return {
            "qkv_bias": bias,
            "o_bias": bias,
            "parallel": True,
            "layer_norm": layer_norm,
            "rms_norm_eps": number(config, "layer_norm_eps" if layer_norm else "rms_norm_eps", 1e-5),
            "logits_scaling": 1.0 / number(config, "logit_scale", 0.0625),
            "sliding": tuple(window if kind == "sliding_attention" else None for kind in types),
            "no_rope": tuple(layer for layer, turns in enumerate(turned) if not turns),
        }

    def unsupported(self, config: Mapping[str, Any]) -> str | None:
        """See `Target.unsupported`."""
        selection, together = config.get("expert_selection_fn", "softmax"), "shared_expert_combination_strategy"
        if selection != "softmax":
            return f"expert_selection_fn = {selection!r} (it must be 'softmax')"
        if config.get("num_shared_experts") and config.get(together, "average") != "sum":
            return f"{together} = {config.get(together, 'average')!r} (it must be 'sum')"
        return None

    def turns_neighbours(self, dense: DenseSpec) -> bool:
        """See `Target.turns_neighbours`."""
        return True

    def one_layer(self, *, dense: bool) -> dict[str, Any]:
        """See `Target.one_layer`."""
        return {"mlp_layer_types": ["dense" if dense else "sparse"]}

    def moe_tensors(self, dense: DenseSpec, layout: MoeLayout, layer: int) -> Iterator[OutTensor]:
        """See `Target.moe_tensors`."""
        block = f"model.layers.{layer}.mlp."
        yield OutTensor(block + "gate.weight", (layout.num_experts, dense.hidden_size), "router", Router(), layer)
        yield from expert_tensors(block, dense.hidden_size, layout, layer)
        if layout.shared_width:
            yield from shared_tensors(block + "shared_experts.", dense.hidden_size, layout, self.shared_bake, layer)

    def warnings(self, dense: DenseSpec, layout: MoeLayout) -> list[str]:
        """See `Target.warnings`."""
        return [
            "cohere2_moe runs in transformers 5: mlx-lm, mistral.rs and export-gguf refuse it, and vLLM was not tried",
            "transformers' cohere2_moe has no auxiliary loss: other trainers leave its router unbalanced",
        ]


def _turns_everywhere(dense: DenseSpec) -> bool:
    """Return whether all layers have rotary positions and full attention."""
    return not dense.no_rope and not any(dense.sliding)
