"""Llama 1, 2 and 3, and the many models of that shape (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import DenseSpec, Source, common
from .fields import DECODER, NUMBER, Field, Fields, sizes


class Llama(Source):
    """Grouped queries, llama3 rope scaling, tied embeddings, ``head_dim`` and ``attention_bias`` are carried over."""

    name = "llama"
    summary = "Llama 1/2/3 and models of that shape"
    reference = "arXiv:2302.13971, arXiv:2407.21783"
    fields: ClassVar[Fields] = {
        **DECODER,
        **sizes(32000, 4096, 11008, layers=32, heads=32, positions=2048),
        "pretraining_tp": Field(int | None, 1),
        "attention_bias": Field(bool, False),
        "attention_dropout": Field(NUMBER | None, 0.0),
        "mlp_bias": Field(bool, False),
        "head_dim": Field(int | None, None),
    }

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        bias = bool(config.get("attention_bias", False))
        return common(self.name, config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
