"""Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Source, common, positive
from .fields import DECODER, Field, Fields, sizes


class Mistral(Source):
    """Llama with a sliding window in every layer (or none)."""

    name = "mistral"
    summary = "Mistral, sliding window kept"
    reference = "arXiv:2310.06825"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(32000, 4096, 14336, layers=32, heads=32, positions=4096 * 32),
        "num_key_value_heads": Field(int, 8),
        "head_dim": Field(int | None, None),
        "sliding_window": Field(int | None, 4096),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        if config.get("layer_types"):
            raise CheckpointError(
                "config.json: layer_types is set: this Mistral alternates attention types (Ministral).",
                hint="Set model_type to ministral, which is read with its layer_types.",
            )
        window = config.get("sliding_window", 4096)
        kv_heads = positive(config, "num_key_value_heads", 8)
        layers = positive(config, "num_hidden_layers")
        return common(self.name, config, sliding=(window or None,) * layers, num_kv_heads=kv_heads)
