"""Gemma 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .base import DenseSpec, Read, Source, canonical_shapes, common, positive


class Gemma(Source):
    """Llama with norms of weight ``1 + w``, embeddings times ``sqrt(hidden_size)`` and a tanh GELU gate.

    The norm's 1 is added on reading, which only float32 holds exactly.
    """

    name = "gemma"
    summary = "Gemma 1 (needs --dtype float32, see the plan)"
    reference = "arXiv:2403.08295"

    def spec(self, config: Mapping[str, Any]) -> DenseSpec:
        """See `Source.spec`."""
        act = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
        if config.get("use_bidirectional_attention"):
            raise CheckpointError("config.json: use_bidirectional_attention is set, but every target is causal.")
        bias = bool(config.get("attention_bias", False))
        return common(
            self.name,
            config,
            head_dim=positive(config, "head_dim", 256),
            hidden_act="gelu_pytorch_tanh" if act == "gelu" else act,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
            qkv_bias=bias,
            o_bias=bias,
            embedding_multiplier=math.sqrt(positive(config, "hidden_size")),
            norm_offset=1.0,
        )

    def canonical(self, spec: DenseSpec) -> dict[str, Read]:
        """See `Source.canonical`."""
        return {
            name: Read(name, ops=(("add", 1.0),) if name.endswith("norm.weight") else ())
            for name in canonical_shapes(spec)
        }
