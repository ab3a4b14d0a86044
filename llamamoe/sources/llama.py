"""Llama 1, 2 and 3, and the many models of that shape (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import DenseSpec, Source, common


class Llama(Source):
    """Grouped queries, llama3 rope scaling, tied embeddings, ``head_dim`` and ``attention_bias`` are carried over."""

    name = "llama"
    summary = "Llama 1/2/3 and models of that shape"
    reference = "arXiv:2302.13971, arXiv:2407.21783"

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config.get("attention_bias", False))
        return common(self.name, config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
