"""Cohere 1: Command R, Aya 23, Aya Expanse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Read, Source, common, number, paired_reads, rope_parameters
from .cohere2 import Cohere2
from .fields import NUMBER, Field, Fields

_OF_WINDOWS = ("sliding_window", "layer_types")


class Cohere(Source):
    """Cohere 2 without attention windows, and with rotary positions in all layers."""

    name = "cohere"
    summary = "Cohere 1 (Command R, Aya), attention and FFN side by side"
    reference = "https://huggingface.co/CohereForAI/c4ai-command-r-v01"
    fields: ClassVar[Fields] = {
        **{key: field for key, field in Cohere2.fields.items() if key not in _OF_WINDOWS},
        "logit_scale": Field(float | None, 0.0625),
        "layer_norm_eps": Field(float | None, 1e-5),
        "attention_dropout": Field(NUMBER | None, 0.0),
        "use_qk_norm": Field(bool | None, False),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config["attention_bias"])
        return common(
            self.name,
            config,
            rope=rope_parameters(config, 500000.0),
            rms_norm_eps=number(config, "layer_norm_eps", 1e-5),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm="each" if config["use_qk_norm"] else "",
            logits_scaling=1.0 / number(config, "logit_scale", 0.0625),
            parallel=True,
            layer_norm=True,
        )

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        return paired_reads(spec)
