"""Granite 3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import DenseSpec, Source, common, number


class Granite(Source):
    """Llama with four multipliers (embedding, attention, residual, logits)."""

    name = "granite"
    summary = "Granite 3 (dense)"
    reference = "arXiv:2408.13359"

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
