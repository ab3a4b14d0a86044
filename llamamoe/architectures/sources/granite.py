"""Granite 3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common, number
from .fields import DECODER, NUMBER, Field, Fields, sizes


class Granite(Source):
    """Llama with four multipliers (embedding, attention, residual, logits)."""

    name = "granite"
    summary = "Granite 3 (dense)"
    reference = "arXiv:2408.13359"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(32000, 4096, 11008, layers=32, heads=32, positions=2048),
        "attention_bias": Field(bool, False),
        "mlp_bias": Field(bool, False),
        "embedding_multiplier": Field(NUMBER, 1.0),
        "logits_scaling": Field(NUMBER, 1.0),
        "residual_multiplier": Field(NUMBER, 1.0),
        "attention_multiplier": Field(NUMBER, 1.0),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config.get("attention_bias", False))
        return common(
            self.name,
            config,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            embedding_multiplier=number(config, "embedding_multiplier", 1.0),
            attention_multiplier=number(config, "attention_multiplier", 1.0),
            residual_multiplier=number(config, "residual_multiplier", 1.0),
            logits_scaling=number(config, "logits_scaling", 1.0),
        )
