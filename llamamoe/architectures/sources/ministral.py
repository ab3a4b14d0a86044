"""Ministral 8B: Mistral with sliding windows in some layers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import CheckpointError
from .base import DenseSpec, Source, common, named_head_dim, positive, windows_by_type
from .fields import DECODER, Field, Fields, sizes


class Ministral(Source):
    """Llama with sliding windows in the layers that ``layer_types`` names, or in all."""

    name = "ministral"
    summary = "Ministral 8B, sliding windows by layer"
    reference = "https://mistral.ai/news/ministraux"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(32000, 4096, 14336, layers=32, heads=32, positions=4096 * 32),
        "num_key_value_heads": Field(int, 8),
        "head_dim": Field(int | None, None),
        "sliding_window": Field(int | None, 4096),
        "layer_types": Field(list[str] | None, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        if not config["sliding_window"]:
            raise CheckpointError(
                f"config.json: sliding_window = {config['sliding_window']!r}, but transformers builds the mask of a window for "
                "every Ministral, and cannot run it without one.",
                hint="Without windows the model is a Mistral: set model_type to mistral.",
            )
        layers = positive(config, "num_hidden_layers")
        types = config["layer_types"] if config["layer_types"] is not None else ["sliding_attention"] * layers
        windows = windows_by_type({**config, "layer_types": types, "use_sliding_window": True}, layers, None)
        heads = positive(config, "num_key_value_heads", 8)
        return common(self.name, config, head_dim=named_head_dim(config), sliding=windows, num_kv_heads=heads)
