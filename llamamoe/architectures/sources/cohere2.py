"""Cohere 2: Command R7B, Command A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Read, Source, common, number, paired_reads, positive, types_by_interval, windows_by_type
from .fields import DECODER, NUMBER, TOKEN, TOKENS, Field, Fields, sizes


class Cohere2(Source):
    """Attention and FFN side by side behind one LayerNorm; layers with a window have rotary positions, the others none.

    Rotary positions turn neighbouring rows of queries and keys: these are re-ordered on reading (exact).
    """

    name = "cohere2"
    summary = "Cohere 2 (Command R7B, Command A), attention and FFN side by side"
    reference = "arXiv:2504.00698"
    fields: ClassVar[Fields] = {
        **{key: field for key, field in DECODER.items() if key != "rms_norm_eps"},
        **sizes(256000, 8192, 22528, layers=40, heads=64, positions=8192),
        "logit_scale": Field(float, 0.0625),
        "layer_norm_eps": Field(float, 1e-5),
        "pad_token_id": Field(TOKEN, 0),
        "bos_token_id": Field(TOKEN, 5),
        "eos_token_id": Field(TOKENS, 255001),
        "tie_word_embeddings": Field(bool, True),
        "attention_bias": Field(bool, False),
        "attention_dropout": Field(NUMBER, 0.0),
        "sliding_window": Field(int | None, 4096),
        "layer_types": Field(list[str] | None, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        layers, window = positive(config, "num_hidden_layers"), config["sliding_window"]
        if window is None:
            raise CheckpointError(
                "config.json: sliding_window = None, but transformers cannot run cohere2 without a window."
            )
        bias = bool(config["attention_bias"])
        types = config["layer_types"] or types_by_interval(
            config, "sliding_window_pattern", "sliding_attention", layers
        )
        windows = windows_by_type({**config, "layer_types": types, "use_sliding_window": True}, layers, None)
        return common(
            self.name,
            config,
            rms_norm_eps=number(config, "layer_norm_eps", 1e-5),
            qkv_bias=bias,
            o_bias=bias,
            sliding=windows,
            no_rope=tuple(layer for layer, each in enumerate(windows) if each is None),
            logits_scaling=1.0 / number(config, "logit_scale", 0.0625),
            parallel=True,
            layer_norm=True,
        )

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        return paired_reads(spec)
