"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common, positive, windows_by_type
from .fields import QWEN, Fields


class Qwen2(Source):
    """Llama with biases on q, k and v, and optional windows from one layer on."""

    name = "qwen2"
    summary = "Qwen2 and Qwen2.5"
    reference = "arXiv:2407.10671"
    fields: ClassVar[Fields] = QWEN

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        layers = positive(config, "num_hidden_layers")
        return common(self.name, config, qkv_bias=True, sliding=windows_by_type(config, layers, 4096))
