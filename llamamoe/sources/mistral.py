"""Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .base import DenseSpec, Source, common, positive


class Mistral(Source):
    """Llama with a sliding window in every layer (or none)."""

    name = "mistral"
    summary = "Mistral, sliding window kept"
    reference = "arXiv:2310.06825"

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        if config.get("layer_types"):
            raise CheckpointError(
                "config.json: this Mistral alternates attention types (Ministral), which no target here is known to hold exactly."
            )
        window = config.get("sliding_window", 4096)
        kv_heads = positive(config, "num_key_value_heads", 8)
        layers = positive(config, "num_hidden_layers")
        return common(self.name, config, sliding=(window or None,) * layers, num_kv_heads=kv_heads)
