"""Qwen3.5, the text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Source, common, number, positive, rope_parameters, types_by_interval
from .fields import DECODER, NUMBER, TOKEN, TOKENS, Field, Fields, sizes
from .linear_attention import LinearAttention

PARTIAL = 0.25
"""The share of each head with rotary positions if the configuration names none."""


class Qwen35Text(Source):
    """Gated delta networks in most layers, gated attention in the others, norms by 1 + w."""

    name = "qwen3_5_text"
    summary = "Qwen3.5 (text), gated delta networks in most layers"
    reference = "https://huggingface.co/Qwen/Qwen3.5-27B"
    only_five = True
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(248320, 4096, 12288, layers=32, heads=16, positions=32768),
        "num_key_value_heads": Field(int, 4),
        "attention_bias": Field(bool, False),
        "attention_dropout": Field(NUMBER, 0.0),
        "head_dim": Field(int, 256),
        "linear_conv_kernel_dim": Field(int, 4),
        "linear_key_head_dim": Field(int, 128),
        "linear_value_head_dim": Field(int, 128),
        "linear_num_key_heads": Field(int, 16),
        "linear_num_value_heads": Field(int, 32),
        "layer_types": Field(list[str] | None, None),
        "pad_token_id": Field(TOKEN, None),
        "bos_token_id": Field(TOKEN, None),
        "eos_token_id": Field(TOKENS, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        return common(self.name, config, **hybrid_spec(config))


def hybrid_spec(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `DenseSpec` that Qwen3.5 and its mixture spell alike.

    Raises:
        CheckpointError: A value is invalid.
    """
    rope = rope_parameters(config, with_images=True)
    partial = number(rope if "partial_rotary_factor" in rope else config, "partial_rotary_factor", PARTIAL)
    bias, layers = bool(config["attention_bias"]), positive(config, "num_hidden_layers")
    types = config["layer_types"] or types_by_interval(config, "full_attention_interval", "linear_attention", layers)
    if len(types) != layers:
        raise CheckpointError(f"config.json: layer_types has {len(types)} entries, but there are {layers} layers.")
    return {
        "rope": {key: value for key, value in rope.items() if key != "partial_rotary_factor"},
        "partial_rotary_factor": partial,
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": "heads",
        "gated_attention": True,
        "zero_centred": True,
        "linear": LinearAttention.of(config, types),
    }
