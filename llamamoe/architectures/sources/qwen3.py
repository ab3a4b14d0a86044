"""Qwen3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common, positive, windows_by_type
from .fields import QWEN, Field, Fields


class Qwen3(Source):
    """Llama with an RMSNorm on each head of q and k."""

    name = "qwen3"
    summary = "Qwen3 (dense)"
    reference = "arXiv:2505.09388"
    fields: ClassVar[Fields] = {**QWEN, "head_dim": Field(int, 128), "attention_bias": Field(bool, False)}

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config.get("attention_bias", False))
        layers = positive(config, "num_hidden_layers")
        return common(
            self.name,
            config,
            head_dim=positive(config, "head_dim", 128),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm="heads",
            sliding=windows_by_type(config, layers, 4096),
        )
